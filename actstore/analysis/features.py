"""Features: numbers of a row, such as its products with directions, its neurons, or the latents of an SAE."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.analysis import sae_lens_objects
from actstore.errors import JobError
from actstore.reason import reason

if TYPE_CHECKING:
    import torch


class Features(Protocol):
    """A function of rows, with a name for what it is."""

    @property
    def is_sparse(self) -> bool:
        """Whether 0 means that a feature is not there, as with SAEs."""
        ...

    def __call__(self, rows: "torch.Tensor") -> "torch.Tensor":
        """Features of rows [n_rows, *shape], float32 [n_rows, n_features] on the CPU."""
        ...

    def identity(self) -> str:
        """A text that differs for other features.

        Raises:
            JobError: nothing can tell them from others.
        """
        ...


@dataclass(frozen=True, eq=False)
class Directions:
    """Products with directions."""

    directions: NDArray[np.float32]
    """[n_features, d], where d is the product of the hook's shape."""
    is_sparse: bool = False

    def __call__(self, rows: "torch.Tensor") -> "torch.Tensor":
        import torch

        return rows.flatten(1).float() @ torch.from_numpy(self.directions).T

    def identity(self) -> str:
        return f"directions {self.directions.shape} {hashlib.sha256(self.directions.tobytes()).hexdigest()}"


@dataclass(frozen=True)
class Neurons:
    """Elements of the value itself."""

    neurons: tuple[int, ...]
    is_sparse: bool = False

    def __call__(self, rows: "torch.Tensor") -> "torch.Tensor":
        return rows.flatten(1)[:, list(self.neurons)].float()

    def identity(self) -> str:
        return f"neurons {self.neurons}"


@dataclass(frozen=True, eq=False)
class Encoded:
    """Latents of an SAE: of any object with ``encode``, such as those of SAELens and dictionary_learning."""

    sae: Any
    latents: tuple[int, ...] | None = None
    """The latents that are taken; None for all."""
    is_sparse: bool = True

    def __call__(self, rows: "torch.Tensor") -> "torch.Tensor":
        import torch

        first = next(self.sae.parameters())
        with torch.no_grad(), sae_lens_objects.in_turn(self.sae):
            encoded = self.sae.encode(rows.to(first.device, first.dtype))
            chosen = encoded if self.latents is None else encoded[..., list(self.latents)]
            return chosen.float().cpu()  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"sae": sae_lens_objects.sent(self.sae)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, sae=sae_lens_objects.received(state["sae"]))

    def identity(self) -> str:
        import torch

        digest = hashlib.sha256()
        for name, values in sorted(self.sae.state_dict().items()):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        # What is no weight, such as k, stands in the configuration, or else in attributes.
        config = getattr(self.sae, "cfg", None)
        if config is None:
            config = _plain_attributes(self.sae)
        return f"{type(self.sae).__name__} {config} {self.latents} {digest.hexdigest()}"


def _plain_attributes(sae: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, class, and numbers and texts that are public attributes, of an object and each module in it."""
    modules = sae.named_modules() if hasattr(sae, "named_modules") else [("", sae)]
    return [
        (
            name,
            type(module).__qualname__,
            {
                key: value
                for key, value in sorted(vars(module).items())
                if isinstance(value, bool | int | float | str) and not key.startswith("_")
            },
        )
        for name, module in modules
    ]


@dataclass(frozen=True, eq=False)
class Computed:
    """Whatever a function gives."""

    function: "Callable[[torch.Tensor], torch.Tensor]"
    is_sparse: bool = False

    def __call__(self, rows: "torch.Tensor") -> "torch.Tensor":
        import torch

        with torch.no_grad():
            values = self.function(rows)
        shape = list(getattr(values, "shape", ()))
        if not isinstance(values, torch.Tensor) or len(shape) != 2 or shape[0] != len(rows) or not shape[1]:
            raise JobError(
                f"the function gave {type(values).__name__} {shape} for {len(rows)} rows; it must give a tensor "
                "[n_rows, n_features]"
            )
        return values.float().cpu()

    def identity(self) -> str:
        raise JobError(
            "a function cannot be told from another one, so that a scan of it cannot go on; leave resume out"
        )


def features_of(of: Any, shape: Sequence[int]) -> Features:
    """Features from what a user gives.

    Args:
        of: directions [n_features, d] or one [d]; a list of neurons; an SAE (anything with ``encode``); or a function
            of rows [n_rows, *shape] that gives [n_rows, n_features].
        shape: shape of the hook at one position.

    Raises:
        JobError: it is none of these, or does not fit the hook.
    """
    size = int(np.prod(shape))
    if hasattr(of, "encode") and hasattr(of, "parameters"):
        encoded = Encoded(sae_lens_objects.inference(of, "the SAE"))
        _check_takes(encoded, shape)
        return encoded
    if callable(of) and hasattr(of, "identity") and hasattr(of, "is_sparse"):
        return of  # type: ignore[no-any-return]
    if callable(of) and not hasattr(of, "__array__"):
        return Computed(of)
    try:
        values = np.asarray(of.detach().float().cpu() if hasattr(of, "detach") else of)
    except ValueError as error:  # lists of several lengths
        raise JobError(
            f"features are no array; give directions [n, {size}], all of one length, or a list of neurons"
        ) from error
    if values.dtype.kind in "iu" and values.ndim <= 1 and values.size:
        if values.min() < 0 or values.max() >= size:
            raise JobError(
                f"neurons reach from {values.min()} to {values.max()}, and the hook has {size} elements"
            )
        return Neurons(tuple(np.atleast_1d(values).tolist()))
    if values.dtype.kind != "f" or values.ndim not in (1, 2) or values.shape[-1] != size or not values.size:
        raise JobError(
            f"features are {values.dtype} of shape {values.shape}; give directions [n, {size}], a list of neurons, "
            "an SAE, or a function"
        )
    if not np.isfinite(values).all():
        raise JobError("directions hold NaN or infinity; leave such directions out")
    return Directions(np.ascontiguousarray(np.atleast_2d(values), np.float32))


def _check_takes(encoded: Encoded, shape: Sequence[int]) -> None:
    """Try an SAE with rows of zeros.

    Raises:
        JobError: it does not take rows of the hook.
    """
    import torch

    try:
        encoded(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, IndexError) as error:
        raise JobError(
            f"the SAE does not take rows of shape {list(shape)}: {reason(error)}; choose the hook that it was trained "
            "on"
        ) from error
