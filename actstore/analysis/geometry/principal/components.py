"""The principal components of a hook as numbers, and the coordinates of rows along them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError

if TYPE_CHECKING:
    import torch

Float64 = NDArray[np.float64]
Values = TypeVar("Values", "torch.Tensor", NDArray[Any])
_CHUNK = 1 << 23
"""Elements that are converted to float64 at a time."""


@dataclass(frozen=True, eq=False, repr=False)
class Components:
    """Principal components of the rows of a hook."""

    hook: str
    shape: tuple[int, ...]
    """Shape of the value at one token, whose product is ``size``."""
    components: Float64
    """Directions of length 1, that of the largest variance first, [n_components, size]. The element of each with the
    largest absolute value is positive.
    """
    explained_variance: Float64
    """Variance of the rows along each component, for the sample (divided by ``count - 1``), [n_components]. It is the
    mean square less the square of the mean, in float64, so it is off by up to about 1e-15 of the mean squared norm.
    """
    total_variance: float
    """Sum of the variances of all elements."""
    mean: Float64
    """The mean row, [size]."""
    count: int
    """Number of rows."""
    n_not_finite: int
    """Rows with NaN or infinity, which were left out."""
    is_from_statistics: bool
    """Whether this comes from the statistics of the store, so that no row was read."""

    @property
    def n_components(self) -> int:
        return len(self.components)

    @property
    def explained_variance_ratio(self) -> Float64:
        """Share of the total variance along each component, [n_components]; NaN if the rows do not differ."""
        with np.errstate(invalid="ignore"):
            return self.explained_variance / np.float64(self.total_variance)

    def direction(self, component: int) -> "torch.Tensor":
        """A component as a direction for `patching.steering`, float32 [*shape]."""
        import torch

        return torch.from_numpy(self.components[component].reshape(self.shape).astype(np.float32))

    def transform(self, rows: Values) -> Values:
        """The coordinates of rows along the components.

        Args:
            rows: rows [..., *shape], as a tensor or an array.

        Returns:
            [..., n_components], computed in float64: as float64 if the rows are, and else as float32.

        Raises:
            JobError: the rows have another shape.
        """
        coordinates: Values = _projected(rows, self.shape, self.mean, self.components)
        return coordinates

    def inverse_transform(self, coordinates: Values) -> Values:
        """Rows [..., *shape] from their coordinates [..., n_components]: what the components hold of them.

        Raises:
            JobError: the coordinates are not of so many components.
        """
        k = self.n_components
        flat: Any = _projected(coordinates, (k,), np.zeros(k), self.components.T)
        mean: Any = self.mean if isinstance(flat, np.ndarray) else _like(self.mean, flat)
        rows: Values = (flat + mean).reshape(*flat.shape[:-1], *self.shape)
        return rows

    def whiten(self, rows: Values, *, epsilon: float = 0.0) -> Values:
        """The coordinates of rows along the components, each divided by its standard deviation.

        Args:
            rows: rows [..., *shape], as a tensor or an array.
            epsilon: number that is added to the variances, against noise along those that are small.

        Returns:
            [..., n_components], as from `transform`.

        Raises:
            JobError: the rows have another shape, or a component has no variance.
        """
        variances = self.explained_variance + epsilon
        if variances.min() <= 0:
            raise JobError(
                f"component {int(variances.argmin())} of {self.hook} has no variance to divide by; give an epsilon "
                "above 0, or compute fewer components"
            )
        scaled = self.components / np.sqrt(variances)[:, None]
        coordinates: Values = _projected(rows, self.shape, self.mean, scaled)
        return coordinates


def _projected(rows: Any, shape: tuple[int, ...], mean: Float64, components: Float64) -> Any:
    """Products of rows [..., *shape] less their mean with components [n, size], as [..., n]."""
    import torch

    is_array = isinstance(rows, np.ndarray)
    values = torch.from_numpy(rows) if is_array else rows
    if values.ndim < len(shape) or tuple(values.shape[values.ndim - len(shape) :]) != shape:
        raise JobError(
            f"rows have shape {list(values.shape)}, and [..., {', '.join(map(str, shape))}] is needed"
        )
    leading = values.shape[: values.ndim - len(shape)]
    flat = values.detach().cpu().reshape(-1, len(mean))
    kind = torch.float64 if values.dtype == torch.float64 else torch.float32
    found = torch.empty(len(flat), len(components), dtype=kind)
    step = max(1, _CHUNK // len(mean))
    by, offset = torch.from_numpy(np.ascontiguousarray(components)), torch.from_numpy(mean)
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        found[part] = (flat[part].to(torch.float64) - offset) @ by.T
    shaped = found.reshape(*leading, len(components))
    return shaped.numpy() if is_array else shaped


def _like(mean: Float64, values: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.from_numpy(mean).to(values.dtype)
