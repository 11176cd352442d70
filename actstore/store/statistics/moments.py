"""Computing statistics of values, from tensors while a segment is extracted, and again from its stored bytes."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.store.format.batches import Batch, places
from actstore.store.format.plan import HookArray
from actstore.store.statistics.hook_statistics import HookStatistics
from actstore.store.statistics.norms import UNSET, rounded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from actstore.store.statistics.norm_sketch import NormSketch

_CPU_CHUNK: Final = 1 << 19
_GPU_CHUNK: Final = 1 << 23
"""Elements that are converted to float64 at a time: on the CPU 4 MB, which stay in the cache; on a GPU 64 MB, which
take few kernels.
"""
_ROUNDING: Final = 1e-9
"""Bound on the difference of two float64 sums of one segment's values in different order, relative to the sum of
absolute values.
"""


def has_statistics(hook: HookArray) -> bool:
    """Whether means over tokens are meaningful: not if an axis is itself positions, as in attention patterns."""
    return "source_position" not in hook.axes


class Moments:
    """Computes the statistics of the hooks of one segment, batch by batch.

    The arithmetic is float64 on the values as they are stored, in an order that depends on the batches alone: equal
    batches give equal bits (second moments only with an equal number of threads, among which BLAS divides its work).
    Nothing waits for a GPU before `records`. Until then it keeps 8 bytes per token and hook.
    """

    def __init__(self, hooks: Sequence[HookArray], device: torch.device | str, *, covariance: bool) -> None:
        """``hooks`` may include hooks without statistics. ``covariance`` costs [D, D] float64 for each other hook, and
        as much arithmetic as a linear layer of that size.
        """
        self._hooks = {hook.name: hook for hook in hooks}
        self._device = device
        self._covariance = covariance
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._sums = {
            name: _Sums(hook.shape, self._device, covariance=self._covariance)
            for name, hook in self._hooks.items()
            if has_statistics(hook)
        }
        self._highest: dict[str, Tensor] = {}

    def add(self, hook_name: str, value: Tensor, is_real: Tensor) -> None:
        """Count a batch. For hooks without statistics only the largest element is kept.

        Args:
            hook_name: The name of a hook.
            value: The values in the storage type, [n, entries, *shape].
            is_real: False for padding and slots that are not in use, bool [n, entries].

        Raises:
            KeyError: there is no such hook.
        """
        if has_statistics(self._hooks[hook_name]):
            self._sums[hook_name].add(value, is_real)
            return
        # NaN if any element is NaN; -Inf, with which attention scores are masked, is never the largest.
        highest = value.amax()
        before = self._highest.get(hook_name)
        self._highest[hook_name] = highest if before is None else highest.maximum(before)

    def not_finite_hooks(self) -> set[str]:
        """The hooks that may hold NaN or infinity, padding included. Waits for the device."""
        hooks = {name for name, highest in self._highest.items() if not math.isfinite(highest.item())}
        return hooks | {name for name, sums in self._sums.items() if sums.has_not_finite}

    def norms(self, width: int) -> dict[str, NDArray[np.float32]]:
        """The norms of all batches since the last reset as they are stored, [n, width] for each hook that has norms, in
        the order of the batches. Waits for the device.

        Args:
            width: entries of a sequence in the store; a batch can have fewer.
        """
        named = self._sums.items()
        return {name: sums.stored_norms(width) for name, sums in named if self._hooks[name].has_norms}

    def records(self) -> dict[str, HookStatistics]:
        """The records of all batches since the last reset, by hook name. Waits for the device."""
        return {name: sums.record() for name, sums in self._sums.items()}


class _Sums:
    """The running sums of one hook, on the device."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str, *, covariance: bool) -> None:
        import torch

        size = math.prod(shape)
        self._norms: list[Tensor] = []
        """The norms of all rows of the batches, flat."""
        self._shapes: list[tuple[int, int]] = []
        """The shape of each batch: (sequences, entries)."""
        self._fetched: NDArray[np.float64] | None = None
        self.has_not_finite = False
        """Whether a value was NaN or infinite; it is known once there is a record."""
        self._total = torch.zeros(size, dtype=torch.float64, device=device)
        self._max_abs = torch.zeros((), dtype=torch.float64, device=device)
        self._moment = torch.zeros(size, size, dtype=torch.float64, device=device) if covariance else None

    def add(self, value: Tensor, is_real: Tensor) -> None:
        import torch

        self._shapes.append((value.shape[0], value.shape[1]))
        self._fetched = None
        with torch.inference_mode():
            rows = value.reshape(-1, len(self._total))
            add = self._add_on_cpu if rows.device.type == "cpu" else self._add_on_gpu
            add(rows, is_real.reshape(-1).to(rows.device, non_blocking=rows.is_cuda))

    def _add_on_cpu(self, rows: Tensor, is_real: Tensor) -> None:
        import torch

        step = max(1, _CPU_CHUNK // rows.shape[1])
        chosen = None if is_real.all() else is_real.nonzero()[:, 0]
        n_rows = len(rows) if chosen is None else len(chosen)
        norms = torch.empty(n_rows, dtype=torch.float64)
        every = norms if chosen is None else torch.full((len(rows),), UNSET, dtype=torch.float64)
        buffer = torch.empty(min(step, n_rows), rows.shape[1], dtype=torch.float64)
        for start in range(0, n_rows, step):
            part = slice(start, start + step)
            values = rows[part] if chosen is None else rows.index_select(0, chosen[part])
            # Converting float16 directly is four times slower than through float32.
            exact = buffer[: len(values)].copy_(values.float() if values.dtype == torch.float16 else values)
            # float64 holds the square of any float32, so a norm is finite exactly if its elements are.
            torch.linalg.vector_norm(exact, dim=1, out=norms[part])
            if not math.isfinite(norms[part].sum().item()):
                finite = norms[part].isfinite()
                values, exact = values[finite], exact[finite]
            if len(values):
                lowest, highest = torch.aminmax(values)
                self._max_abs.fill_(max(self._max_abs.item(), highest.item(), -lowest.item()))
                self._add_sums(exact)
        if chosen is not None:
            every[chosen] = norms
        self._norms.append(every)

    def _add_on_gpu(self, rows: Tensor, is_real: Tensor) -> None:
        """Add without looking at any value, since that would wait for the GPU."""
        import torch

        step = max(1, _GPU_CHUNK // rows.shape[1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            exact = rows[part].to(torch.float64)
            norms = torch.linalg.vector_norm(exact, dim=1)
            exact.masked_fill_(~(norms.isfinite() & is_real[part])[:, None], 0.0)
            lowest, highest = torch.aminmax(exact)
            self._max_abs = self._max_abs.maximum(highest).maximum(-lowest)
            self._add_sums(exact)
            self._norms.append(norms.masked_fill_(~is_real[part], UNSET))

    def _add_sums(self, exact: Tensor) -> None:
        if exact.shape[1] == 1 and not exact.is_cuda:
            # For a single column, torch splits the sum by the number of its threads, which changes its rounding.
            self._total += float(exact.numpy().sum())
        else:
            self._total += exact.sum(dim=0)
        if self._moment is not None:
            self._moment.addmm_(exact.T, exact)

    def _every_norm(self) -> NDArray[np.float64]:
        """The norm of every row, `UNSET` for padding. It is fetched from the device once."""
        import torch

        if self._fetched is None:
            self._fetched = torch.cat(self._norms).cpu().numpy() if self._norms else np.empty(0)
        return self._fetched

    def stored_norms(self, width: int) -> NDArray[np.float32]:
        """The norms as they are stored, [n, width]."""
        norms = rounded(self._every_norm())
        stored = np.full((sum(n for n, _ in self._shapes), width), np.nan, np.float32)
        sequence = at = 0
        for n_sequences, n_entries in self._shapes:
            end = at + n_sequences * n_entries
            rows = slice(sequence, sequence + n_sequences)
            stored[rows, :n_entries] = norms[at:end].reshape(n_sequences, n_entries)
            sequence, at = sequence + n_sequences, end
        return stored

    def record(self) -> HookStatistics:
        norms = self._every_norm()
        self.has_not_finite = not bool(np.isfinite(norms).all())
        return HookStatistics.of_tokens(
            norms[norms != UNSET],
            self._total.cpu().numpy(),
            float(self._max_abs),
            None if self._moment is None else self._moment.cpu().numpy(),
        )


def of_rows(
    hook: HookArray,
    rows: NDArray[Any],
    dtype: str,
    counts: NDArray[np.integer[Any]],
    batches: Sequence[Batch],
    *,
    covariance: bool = False,
) -> HookStatistics:
    """The record of stored rows: the first result of `recompute`."""
    return recompute(hook, rows, dtype, counts, batches, covariance=covariance)[0]


def recompute(
    hook: HookArray,
    rows: NDArray[Any],
    dtype: str,
    counts: NDArray[np.integer[Any]],
    batches: Sequence[Batch],
    *,
    covariance: bool = False,
) -> tuple[HookStatistics, NDArray[np.float32]]:
    """Compute the record and the norms [n, entries] of stored rows on the CPU, in the batches of the extraction.

    Args:
        hook: A hook that has statistics.
        rows: The values in the storage type (bfloat16 as uint16), [n, entries, *shape].
        dtype: The name of the type in the store.
        counts: The entries in use of each row, [n].
        batches: The batches that the rows were computed in.
        covariance: Whether to compute the second moment.
    """
    import torch

    sums = _Sums(hook.shape, "cpu", covariance=covariance)
    is_used = np.arange(rows.shape[1]) < np.asarray(counts)[:, None]
    for batch in batches:
        # Copied as bytes, for bfloat16: rows can be a mapped file, and tensors are writable.
        data = torch.from_numpy(np.array(rows[batch.rows], order="C").reshape(-1).view(np.uint8))
        values = data.view(getattr(torch, dtype)).reshape(-1, *rows.shape[1:])
        sums.add(values, torch.from_numpy(is_used[batch.rows]))
    norms, place = sums.stored_norms(rows.shape[1]), places(batches)
    return sums.record(), norms if place is None else norms[place]


def agree(stored: HookStatistics, recomputed: HookStatistics) -> str | None:
    """Return why a stored record contradicts the recomputed one, or None if it does not.

    Counts, ``max_abs`` and which tokens are not finite must be equal. Sums may differ by rounding if they were made in
    another order or on another device, and a norm at the end of a bucket may be in the neighbouring one. Both records
    must have passed `HookStatistics.check`.
    """
    for name in ("count", "n_not_finite", "max_abs"):
        there, here = getattr(stored, name), getattr(recomputed, name)
        if there != here:
            return f"{name} is {there}, and the stored values give {here}"
    for name in ("sum_of_norms", "sum_of_squared_norms", "min_norm", "max_norm"):
        there, here = getattr(stored, name) or 0.0, getattr(recomputed, name) or 0.0
        if abs(there - here) > _ROUNDING * here:
            return f"{name} is {there}, and the stored values give {here}"
    if (stored.second_moment is None) != (recomputed.second_moment is None):
        return "second_moment is in only one of the stored and the recomputed record"
    sums = (
        ("sum", stored.sum, recomputed.sum, recomputed.sum_of_norms),
        ("second_moment", stored.second_moment, recomputed.second_moment, recomputed.sum_of_squared_norms),
    )
    for name, there, here, size in sums:
        if there is not None and here is not None and not _close(there, here, _ROUNDING * size):
            return f"{name} is not that of the stored values"
    if not _same_but_for_rounding(stored.norms, recomputed.norms):
        return "norms are counted in other buckets than those of the stored values"
    return None


def _close(there: str, here: str, tolerance: float) -> bool:
    a, b = (np.frombuffer(base64.b64decode(text), "<f8") for text in (there, here))
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= tolerance))


def _same_but_for_rounding(a: NormSketch, b: NormSketch) -> bool:
    """Whether moving norms to neighbouring buckets turns one sketch into the other."""
    if a.n_zero != b.n_zero or a.count != b.count:
        return False
    in_a, in_b = dict(a.buckets), dict(b.buckets)
    moved = 0
    for index in sorted(in_a | in_b):
        moved += in_a.get(index, 0) - in_b.get(index, 0)
        lower, upper = (in_a, in_b) if moved > 0 else (in_b, in_a)
        if moved and abs(moved) > min(lower.get(index, 0), upper.get(index + 1, 0)):
            return False
    return True
