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
    """One tensor for each hook, [segment_size, context_length, *shape], which is used for one segment after another.

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
            hook.name: self._empty((plan.segment_size, plan.context_length, *hook.shape))
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

    def put(self, hook: str, start: int, n_sequences: int, value: "torch.Tensor") -> None:
        """Copy the first sequences of a batch to rows ``start:start + n_sequences``.

        Raises:
            ModelError: the value has another dtype or shape than planned; it would be cast silently.
        """
        rows = self._tensors[hook][start : start + n_sequences]
        if value.dtype != self._dtype or value.shape[1:] != rows.shape[1:]:
            raise ModelError(
                f"{hook} came out as {value.dtype} {tuple(value.shape[1:])} a sequence, planned was "
                f"{self._dtype} {tuple(rows.shape[1:])}; choose the dtype that the model computes in"
            )
        if self._stream is None:
            rows.copy_(value[:n_sequences])
            return
        import torch

        # The clone is ordered before anything that later layers may do to the value in place.
        clone = value[:n_sequences].clone(memory_format=torch.contiguous_format)
        self._stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(self._stream):
            rows.copy_(clone, non_blocking=True)
        clone.record_stream(self._stream)

    def finish(self) -> None:
        """Wait until every value has arrived in host memory."""
        if self._stream is not None:
            self._stream.synchronize()

    def sequence(self, row: int) -> "Mapping[str, torch.Tensor]":
        """Each hook's values of one sequence, [context_length, *shape]; nothing is copied."""
        return {name: tensor[row] for name, tensor in self._tensors.items()}

    def rows(self, segment: Segment) -> Mapping[str, NDArray[Any]]:
        """Each hook's rows in the storage type, padded with zeros to whole inner chunks; nothing is copied."""
        import torch

        views = {}
        for hook in self._plan.request.hooks:
            layout = self._plan.activations(hook)
            stored = layout.chunks_in(segment.index) * layout.chunk_rows
            tensor = self._tensors[hook.name]
            tensor[segment.n_sequences : stored] = 0
            width = {2: torch.uint16, 4: torch.int32}[tensor.element_size()]
            views[hook.name] = tensor[:stored].view(width).numpy().view(np.uint8)
        return views
