"""An SAE that is evaluated: what it makes of rows, whichever library it is from."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.analysis import sae_lens_objects
from actstore.analysis.features import Encoded
from actstore.errors import JobError
from actstore.reason import reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True, eq=False)
class EvaluatedSae:
    """A named SAE that fits a hook."""

    name: str
    sae: Any
    """Any object with ``encode`` and ``decode``."""
    shape: tuple[int, ...]
    """Shape of the hook at one position."""
    d_sae: int
    n_samples: int | None = None
    """Rows that it was trained on, if it is a checkpoint that says so."""

    @classmethod
    def of(cls, name: str, sae: Any, shape: "Sequence[int]", n_samples: int | None = None) -> "EvaluatedSae":
        """Take an SAE, and try it with a row of zeros.

        Raises:
            JobError: it has no ``encode`` and ``decode``, or does not fit the hook.
        """
        import torch

        if not callable(getattr(sae, "encode", None)) or not callable(getattr(sae, "decode", None)):
            raise JobError(f"{name} is {type(sae).__name__}; give an SAE, which has encode and decode")
        untried = cls(name, sae, tuple(shape), 0, n_samples)
        zeros = torch.zeros(2, *shape)
        try:
            features, rebuilt = untried(zeros)
        except (RuntimeError, ValueError, IndexError) as error:
            raise JobError(
                f"{name} does not take rows of shape {list(shape)}: {reason(error)}; choose the hook that it was "
                "trained on"
            ) from error
        if features.ndim != 2 or rebuilt.shape != zeros.flatten(1).shape:
            raise JobError(
                f"{name} makes features {list(features.shape)} and values {list(rebuilt.shape)} of two rows of shape "
                f"{list(shape)}; an SAE makes [2, d_sae] and [2, {zeros[0].numel()}]"
            )
        return cls(name, sae, tuple(shape), features.shape[1], n_samples)

    def __call__(self, rows: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Features and rebuilt rows, as `encode` and `decode` give them; for several threads at once."""
        with sae_lens_objects.in_turn(self.sae):
            features = self.encode(rows)
            return features, self.decode(features)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"sae": sae_lens_objects.sent(self.sae)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, sae=sae_lens_objects.received(state["sae"]))

    def encode(self, rows: "torch.Tensor") -> "torch.Tensor":
        """Features [n_rows, d_sae] of rows [n_rows, *shape], in the type of the SAE."""
        import torch

        if not getattr(self.sae, "hook_z_reshaping_mode", False):
            rows = rows.flatten(1)
        weight = next(iter(self.sae.parameters()), None) if hasattr(self.sae, "parameters") else None
        with torch.no_grad():
            features: torch.Tensor = self.sae.encode(
                rows.float() if weight is None else rows.to(weight.device, weight.dtype)
            )
        return features.to_dense() if features.is_sparse else features

    def decode(self, features: "torch.Tensor") -> "torch.Tensor":
        """Rebuilt rows [n_rows, d], where d is the product of `shape`, of features that `encode` gave."""
        import torch

        with torch.no_grad():
            rebuilt: torch.Tensor = self.sae.decode(features)
        return rebuilt.flatten(1)

    def identity(self) -> str:
        """A text that differs for other SAEs.

        Raises:
            JobError: nothing can tell it from others.
        """
        if not hasattr(self.sae, "state_dict"):
            raise JobError(
                f"{self.name} is {type(self.sae).__name__}, which has no weights to tell it from others, so that an "
                "evaluation cannot go on; leave resume out"
            )
        return Encoded(self.sae).identity()
