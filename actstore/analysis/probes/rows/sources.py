"""Passes over the labelled rows of some hooks: from the store, or from memory where they were put in one scan.

Both give a pass the same rows in the same blocks, and merge its states by units in the same order. So a result has the
same bits wherever the rows come from.
"""

import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.scanning.reduction import Arrays, Reduction
from actstore.analysis.scanning.scan import ScanOptions, scan

if TYPE_CHECKING:
    import torch

    from actstore.store.committed_store import CommittedStore


class RowsOf(Protocol):
    """Rows of a block: those of `actstore.analysis.scanning.block.Block`, and of `HeldBlock`."""

    @property
    def addresses(self) -> NDArray[np.int64]: ...

    def values(self, hook: str) -> "torch.Tensor": ...


class Source(Protocol):
    """Whatever passes can be run over."""

    def run(self, reduction: Reduction) -> Any:
        """The result of a pass over all rows."""
        ...

    @property
    def n_reads(self) -> int:
        """Scans of the store so far."""
        ...


@dataclass
class FromStore:
    """Every pass is a scan."""

    store: "CommittedStore"
    options: ScanOptions
    n_reads: int = 0

    def run(self, reduction: Reduction) -> Any:
        """See `Source.run`."""
        self.n_reads += 1
        return scan(self.store, {"pass": reduction}, **self.options).results["pass"]


@dataclass(frozen=True)
class HeldBlock:
    """The labelled rows of a block."""

    addresses: NDArray[np.int64]
    rows: "Mapping[str, torch.Tensor]"

    def values(self, hook: str) -> "torch.Tensor":
        """[n_rows, *shape]"""
        return self.rows[hook]


@dataclass(frozen=True)
class FromMemory:
    """Every pass is over rows that are held."""

    units: Sequence[Sequence[HeldBlock]]
    n_reads: int = 1

    def run(self, reduction: Reduction) -> Any:
        """See `Source.run`."""
        state = reduction.start()
        n_threads = os.cpu_count() or 1
        with ThreadPoolExecutor(n_threads, thread_name_prefix="probes") as threads:
            going: deque[Future[Any]] = deque()
            for unit in self.units:
                # Sums of a unit can be large, so few units are on their way.
                if len(going) > n_threads:
                    state.merge(going.popleft().result())
                going.append(threads.submit(_reduced, reduction, unit))
            for future in going:
                state.merge(future.result())
        return reduction.finish(state)


def _reduced(reduction: Reduction, unit: Sequence[HeldBlock]) -> Any:
    import torch

    torch.set_num_threads(1)  # of this thread: sums depend on how they are divided
    state: Any = reduction.start()
    for block in unit:
        if len(block.addresses):
            state.update(block)
    return state


@dataclass(frozen=True, eq=False)
class Addresses:
    """Reduction to the addresses of all rows that are finite in all of some hooks."""

    hooks: tuple[str, ...]

    def identity(self) -> str:
        return f"addresses {self.hooks}"

    def start(self) -> "AddressState":
        return AddressState()

    def restore(self, arrays: Arrays) -> "AddressState":
        """See `Reduction.restore`."""
        return AddressState([arrays["addresses"]])

    def finish(self, state: "AddressState") -> NDArray[np.int64]:
        """[n_rows]"""
        return state.arrays()["addresses"]


@dataclass
class AddressState:
    """Addresses so far."""

    pieces: list[NDArray[np.int64]] = field(default_factory=list)

    def update(self, block: RowsOf) -> None:
        """Take the rows of a block."""
        self.pieces.append(block.addresses)

    def merge(self, other: Self) -> None:
        """Take rows that follow."""
        self.pieces += other.pieces

    def arrays(self) -> Arrays:
        """All that is known."""
        return {"addresses": np.concatenate([np.empty(0, np.int64), *self.pieces])}


@dataclass(frozen=True, eq=False)
class Hold:
    """Reduction to the rows themselves, in their stored dtype."""

    hooks: tuple[str, ...]
    is_taken: NDArray[np.bool_]
    """[n_addresses]"""
    name: str
    """Tells what is taken from other choices."""
    dtypes: "Mapping[str, torch.dtype]"

    def identity(self) -> str:
        return f"hold {self.hooks} {self.name}"

    def start(self) -> "HoldState":
        return HoldState(self)

    def restore(self, arrays: Arrays) -> "HoldState":
        """See `Reduction.restore`."""
        state = HoldState(self)
        unit = [
            HeldBlock(
                arrays[f"addresses.{block}"],
                {
                    hook: self._tensor(hook, arrays[f"rows.{block}.{number}"])
                    for number, hook in enumerate(self.hooks)
                },
            )
            for block in range(int(arrays["n_blocks"][0]))
        ]
        state.units = [unit] if unit else []
        return state

    def _tensor(self, hook: str, rows: NDArray[Any]) -> "torch.Tensor":
        import torch

        # Those from Ray are in its shared memory, and read-only.
        return torch.from_numpy(rows if rows.flags.writeable else rows.copy()).view(self.dtypes[hook])

    def finish(self, state: "HoldState") -> FromMemory:
        return FromMemory(state.units)


@dataclass
class HoldState:
    """The rows so far."""

    of: Hold
    units: list[list[HeldBlock]] = field(default_factory=list)
    unit: list[HeldBlock] = field(default_factory=list)

    def update(self, block: RowsOf) -> None:
        """Take the rows of a block."""
        is_taken = self.of.is_taken[block.addresses]
        if is_taken.any():
            import torch

            chosen = np.flatnonzero(is_taken)
            places = torch.from_numpy(chosen)
            rows = {hook: block.values(hook).flatten(1)[places] for hook in self.of.hooks}  # a copy
            self.unit.append(HeldBlock(block.addresses[chosen], rows))

    def merge(self, other: Self) -> None:
        """Take the units that follow."""
        self.units += other.units
        if other.unit:
            self.units.append(other.unit)

    def arrays(self) -> Arrays:
        """All that is known of a unit. Rows are not copied."""
        import torch

        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        arrays: dict[str, NDArray[Any]] = {"n_blocks": np.array([len(self.unit)], np.int64)}
        for place, block in enumerate(self.unit):
            arrays[f"addresses.{place}"] = block.addresses
            for number, hook in enumerate(self.of.hooks):
                # NumPy has no bfloat16, but integers of every size.
                rows = block.rows[hook].view(integers[self.of.dtypes[hook].itemsize])
                arrays[f"rows.{place}.{number}"] = rows.numpy()
        return arrays
