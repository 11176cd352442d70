"""A probe: a linear function of the rows of a hook, with what was measured of it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.probes.metrics import Interval
from actstore.errors import JobError, StorageError
from actstore.reason import reason

if TYPE_CHECKING:
    import torch

Kind = Literal["logistic", "ridge", "mean_difference", "multinomial"]
_KEY: Final = "actstore.probe"


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear function of the rows of a hook.

    ``scores`` are ``rows @ weights + bias``, in units of the hook: the means and standard deviations of the training
    rows are folded in.
    """

    hook: str
    kind: Kind
    weights: NDArray[np.float64]
    """[d, n_outputs]; one output for two classes, and for numbers. d is the product of the hook's shape."""
    bias: NDArray[np.float64]
    """[n_outputs]"""
    shape: tuple[int, ...]
    """Shape of the hook at one position."""
    classes: tuple[Any, ...]
    """Labels of the classes, sorted; one output is positive for the second of two. Empty where it predicts numbers."""
    l2: float | None
    """The penalty that was chosen, see `fit_probe`; None for a mean difference."""
    metrics: Mapping[str, Interval]
    """``accuracy``, ``auc`` and ``log_loss``, or ``r2`` and ``mse``, on the held-out rows."""
    by_l2: Mapping[float, float]
    """Log loss, or mean squared error, on the held-out rows for each penalty."""
    curve: Mapping[int, float]
    """Accuracy, or R2, on the held-out rows by the number of training documents."""
    is_converged: bool = True
    """False if the search for the minimum was given up."""

    def scores(self, rows: Any) -> NDArray[np.float64]:
        """Scores of rows [n_rows, *shape]: [n_rows], or [n_rows, n_classes] of a multinomial probe.

        Raises:
            JobError: the rows are of another shape.
        """
        values = (
            rows.detach().cpu().double().numpy() if hasattr(rows, "detach") else np.asarray(rows, np.float64)
        )
        if values.shape[1:] not in (self.shape, (len(self.weights),)):
            raise JobError(
                f"rows have the shape {list(values.shape)}; the probe takes [n, {_sizes(self.shape)}]"
            )
        scores = np.asarray(values.reshape(len(values), -1) @ self.weights + self.bias, np.float64)
        return scores if self.kind == "multinomial" else scores.reshape(-1)

    def predict(self, rows: Any) -> NDArray[Any]:
        """The label of each row [n_rows, *shape], or its number: [n_rows].

        Raises:
            JobError: the rows are of another shape.
        """
        scores = self.scores(rows)
        if not self.classes:
            return scores
        numbers = scores.argmax(1) if self.kind == "multinomial" else (scores > 0).astype(np.int64)
        labels: NDArray[Any] = np.array(self.classes)[numbers]
        return labels

    def as_direction(self, label: Any = None, *, normalise: bool = False) -> "torch.Tensor":
        """The direction along which the score grows fastest, float32 in the shape of the hook.

        It is what `patching.steering` adds, and what `top_activations` takes as ``of``: the product of a row with it is
        the score without the bias.

        Args:
            label: class of a multinomial probe.
            normalise: make its length 1.

        Raises:
            JobError: the probe has several directions and no label is given, or it has no such label.
        """
        import torch

        output = 0
        if self.kind == "multinomial":
            if label not in self.classes:
                raise JobError(
                    f"a multinomial probe has a direction for each label; give one of {self.classes}"
                )
            output = self.classes.index(label)
        elif label is not None:
            raise JobError(f"a {self.kind} probe has one direction; leave the label out")
        direction = torch.from_numpy(np.ascontiguousarray(self.weights[:, output]))
        if normalise:
            direction = direction / direction.norm()
        return direction.float().view(self.shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with ``weights`` and ``bias``, and all else in its metadata."""
        from safetensors.numpy import save_file

        document = {
            "hook": self.hook,
            "kind": self.kind,
            "shape": self.shape,
            "classes": self.classes,
            "l2": self.l2,
            "metrics": {name: [one.value, one.low, one.high] for name, one in self.metrics.items()},
            "by_l2": list(self.by_l2.items()),
            "curve": list(self.curve.items()),
            "is_converged": self.is_converged,
        }
        tensors = {"weights": np.ascontiguousarray(self.weights), "bias": np.ascontiguousarray(self.bias)}
        save_file(tensors, path, {_KEY: json.dumps(document)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Probe":
        """Read what `save` wrote.

        Raises:
            StorageError: the file is missing, damaged, or of another kind.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise StorageError(f"there is no file {path}")
        try:
            with safe_open(path, "np") as opened:
                text = (opened.metadata() or {}).get(_KEY)
                if text is None:
                    raise StorageError(f"{path} is no probe; write one with Probe.save")
                document = json.loads(text)
                probe = cls(
                    hook=document["hook"],
                    kind=document["kind"],
                    weights=opened.get_tensor("weights"),
                    bias=opened.get_tensor("bias"),
                    shape=tuple(document["shape"]),
                    classes=tuple(document["classes"]),
                    l2=document["l2"],
                    metrics={name: Interval(*numbers) for name, numbers in document["metrics"].items()},
                    by_l2=dict(document["by_l2"]),
                    curve=dict(document["curve"]),
                    is_converged=document["is_converged"],
                )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path} is damaged as a probe: {reason(error)}") from error
        n_outputs = len(probe.classes) if probe.kind == "multinomial" else 1
        if probe.weights.shape != (int(np.prod(probe.shape)), n_outputs) or probe.bias.shape != (n_outputs,):
            raise StorageError(f"{path} is damaged as a probe: its weights are {probe.weights.shape}")
        return probe

    @property
    def main_metric(self) -> str:
        """``accuracy``, or ``r2`` where numbers are predicted."""
        return "accuracy" if self.classes else "r2"

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {one}" for name, one in self.metrics.items())
        return f"<Probe {self.kind} of {self.hook}: {figures}>"


def _sizes(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
