"""TransformerLens' ``Slice``: a choice along an axis, as an object."""

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

SliceInput = Any
"""An integer, a (start, stop, step) tuple, a list, an array, a tensor, or None."""


class Slice:
    """A choice along an axis. Methods of caches take it, or what it is made of.

    An integer removes the axis, a tuple ``(start, stop, step)`` is a slice, a list or an array chooses indices, and
    None everything.
    """

    def __init__(self, input_slice: SliceInput = None) -> None:
        """
        Raises:
            ValueError: it is none of these.
        """
        import torch

        self.slice: Any = input_slice
        if input_slice is None:
            self.slice, self.mode = slice(None), "identity"
        elif isinstance(input_slice, tuple):
            self.slice, self.mode = slice(*input_slice), "slice"
        elif isinstance(input_slice, slice):
            self.mode = "slice"
        elif isinstance(input_slice, int):
            self.mode = "int"
        elif isinstance(input_slice, list | torch.Tensor) or hasattr(input_slice, "__array__"):
            self.slice, self.mode = _array(input_slice), "array"
        else:
            raise ValueError(f"Invalid input_slice {input_slice}; give an integer, a tuple, a list or None")

    def apply(self, tensor: "torch.Tensor", dim: int = 0) -> "torch.Tensor":
        """The tensor at these places of an axis."""
        places: list[Any] = [slice(None)] * tensor.ndim
        places[dim] = self.slice
        return tensor[tuple(places)]

    def indices(self, max_ctx: int | None = None) -> "NDArray[np.int64]":
        """The indices that are chosen of an axis of this size.

        Raises:
            ValueError: no size is given, and it is not an integer.
        """
        import numpy as np

        if self.mode == "int":
            return np.array([self.slice], dtype=np.int64)
        if max_ctx is None:
            raise ValueError("max_ctx must be given unless the slice is an integer")
        return np.atleast_1d(np.arange(max_ctx, dtype=np.int64)[self.slice])

    @classmethod
    def unwrap(cls, slice_input: "Slice | SliceInput") -> "Slice | Self":
        """The slice itself, or one of what it is made of, in which an integer keeps its axis."""
        if isinstance(slice_input, Slice):
            return slice_input
        return cls([slice_input] if isinstance(slice_input, int) else slice_input)

    def __repr__(self) -> str:
        return f"Slice: {self.slice} Mode: {self.mode} "


def is_slice_object(given: object) -> bool:
    """Whether this is a `Slice`, of this module or of TransformerLens."""
    return type(given).__name__ == "Slice" and hasattr(given, "mode") and hasattr(given, "slice")


def unwrapped(given: Any) -> Any:
    """What a `Slice` chooses, as an integer, a slice, an array or None; anything else as it is."""
    if not is_slice_object(given):
        return given
    return None if given.mode == "identity" else given.slice


def _array(given: Any) -> "NDArray[Any]":
    import numpy as np
    import torch

    return given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
