"""Host memory of one segment: hooks copy their values into it, and it is written to storage without another copy."""

import contextlib
import math
import mmap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ModelError
from actstore.store.format.plan import Plan, Segment

if TYPE_CHECKING:
    import torch


class SegmentBuffers:
    """One tensor for each hook, [segment_size, width, *shape], which is used for one segment after another.

    For a GPU the tensors are pinned, and values are copied on a CUDA stream of their own while the forward goes on.
    """

    def __init__(self, plan: Plan, device: "torch.device") -> None:
        import torch

        self._plan = plan
        self._dtype: torch.dtype = getattr(torch, plan.request.dtype)
        self._on_gpu = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = (
            torch.cuda.Stream(device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        )
        self._tensors = {
            hook.name: self._empty((plan.segment_size, plan.width, *hook.shape))
            for hook in plan.request.hooks
        }

    def _empty(self, shape: tuple[int, ...]) -> "torch.Tensor":
        """Memory that begins at a page: pinned for a GPU, else in huge pages, which are cheap to touch."""
        import torch

        if self._on_gpu:
            return torch.empty(shape, dtype=self._dtype, pin_memory=True)
        memory = mmap.mmap(-1, math.prod(shape) * self._dtype.itemsize)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=self._dtype).view(shape)

    def put(
        self, hook: str, start: int, n_sequences: int, value: "torch.Tensor", n_entries: int | None = None
    ) -> None:
        """Copy the first sequences of a batch to rows ``start:start + n_sequences``.

        Args:
            hook: canonical name.
            start: first row.
            n_sequences: number of sequences.
            value: values [row, entry, *shape].
            n_entries: number of entries that the batch has, if fewer than there are; those behind them become zeros.

        Raises:
            ModelError: the value has another dtype or shape than planned; it would be cast silently.
        """
        import torch

        rows = self._tensors[hook][start : start + n_sequences]
        n_entries = rows.shape[1] if n_entries is None else n_entries
        planned = (n_entries, *rows.shape[2:])
        if value.dtype != self._dtype or value.shape[1:] != planned:
            raise ModelError(
                f"{hook} came out as {value.dtype} {tuple(value.shape[1:])} a sequence, planned was "
                f"{self._dtype} {planned}; choose the dtype that the model computes in"
            )
        if self._stream is None:
            rows[:, :n_entries].copy_(value[:n_sequences])
            rows[:, n_entries:] = 0
            return
        # The copy on the device is ordered before anything that later layers may do to the value in place. It has the
        # width of the rows: a copy to a part of each row would wait.
        clone = value.new_zeros(rows.shape) if n_entries < rows.shape[1] else value.new_empty(rows.shape)
        clone[:, :n_entries] = value[:n_sequences]
        self._stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(self._stream):
            rows.copy_(clone, non_blocking=True)
        clone.record_stream(self._stream)

    def finish(self) -> None:
        """Wait until every value has arrived in host memory."""
        if self._stream is not None:
            self._stream.synchronize()

    def sequence(self, row: int) -> "Mapping[str, torch.Tensor]":
        """Each hook's values of one sequence, [width, *shape]; nothing is copied.

        Args:
            row: where the sequence was put.
        """
        return {name: tensor[row] for name, tensor in self._tensors.items()}

    def rows(self, segment: Segment, places: NDArray[Any] | None = None) -> Mapping[str, NDArray[Any]]:
        """Each hook's rows in stored order and in the storage type, padded with zeros to whole inner chunks.

        Args:
            segment: the segment that was put.
            places: where each of its sequences was put; None if in stored order, so that nothing is copied. They can be
                given once.
        """
        import torch

        views = {}
        for hook in self._plan.request.hooks:
            layout = self._plan.activations(hook)
            stored = layout.chunks_in(segment.index) * layout.chunk_rows
            tensor = self._tensors[hook.name]
            tensor[segment.n_sequences : stored] = 0
            width = {2: torch.uint16, 4: torch.int32}[tensor.element_size()]
            view = tensor[:stored].view(width).numpy()
            if places is not None:
                view[: segment.n_sequences] = view[places]
            views[hook.name] = view.view(np.uint8)
        return views
