"""The pool: it gives units of work to workers, and sees that every unit is done whatever happens to them.

A worker that dies, or is silent for much longer than units have taken so far, is replaced, and its units are given to
others. Workers that have nothing left to do take units again that others have not begun or are late with. It is the
store, not the pool, that guarantees that each segment is committed exactly once.
"""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from actstore.errors import (
    ActstoreError,
    BusyError,
    ExtractError,
    HookError,
    JobError,
    ModelError,
    PatchError,
    PlanMismatchError,
    SetAsideError,
    TokensError,
)
from actstore.extraction.computing.worker import SEGMENTS_IN_FLIGHT
from actstore.extraction.pool.fleet import Call, Fleet, WorkerLostError, WorkerRaisedError
from actstore.extraction.pool.pace import Pace
from actstore.reason import reason

_log = logging.getLogger("actstore")

MAX_ATTEMPTS: Final = 3
"""The most attempts at one unit, and at starting workers in a row. Preempted workers do not count."""
MAX_FAILURES: Final = 12
"""The most units that may fail one after the other, without one that is done between them: then something is wrong
with all of them, such as the storage.
"""
_PERMANENT: Final = (
    BusyError,
    JobError,
    ModelError,
    HookError,
    PatchError,
    PlanMismatchError,
    TokensError,
)
"""Errors that every further attempt would raise again."""
_WAIT_S: Final = 1.0
_STALL_WARNING_S: Final = 60.0
_GROWTH_S: Final = 10.0
"""Seconds between looks at whether the fleet has room for more workers."""
_LATE: Final = 2.0
"""A worker is late if it is silent for so many times the longest time that a unit has taken."""
_SHOWN: Final = 5
"""Number of units that failed which are named with their errors."""


@dataclass(eq=False)
class _Slot:
    """A place in the pool, with the worker that fills it."""

    worker: Any
    is_ready: bool = False
    units: list[int] = field(default_factory=list)
    """Units that it has in hand, in the order in which they were given."""
    where: str = "a worker that is not placed yet"
    silent_since: float = math.inf
    """Time of the last sign of life, or of the first call after a time without any; infinite before the worker is
    placed.
    """
    last_done: float = -math.inf
    """Time at which it last finished a unit."""
    calls: dict[Any, Call] = field(default_factory=dict)
    """Its calls that are under way, with the kind of each."""


class Pool:
    """The units that are pending, the workers, and what is known of both."""

    def __init__(
        self, fleet: Fleet, unit: str, pending: Sequence[int], on_done: Callable[[Any], None]
    ) -> None:
        """Begin to start workers.

        Args:
            fleet: where they live.
            unit: what a unit is called in messages, such as ``segment``.
            pending: numbers of the units.
            on_done: called once for each unit with what a worker returned.
        """
        self._fleet = fleet
        self._unit = unit
        self._pending = deque(pending)
        self._on_done = on_done
        self._open = set(pending)
        """Units that are neither done nor set aside."""
        self._attempts: Counter[int] = Counter()
        self._hangs: Counter[int] = Counter()
        """Number of workers that were given up over each unit."""
        self._set_aside: dict[int, str] = {}
        """Units that failed for good, with the last error of each."""
        self._n_failures = 0
        """Failed units since one was done."""
        self._failed_starts = 0
        self._pace = Pace()
        self._callers: dict[Any, _Slot] = {}
        """The slot of each call that is under way."""
        self._slots: list[_Slot] = []
        self._grown_at = -math.inf
        self._watched_at = -math.inf

    def run(self) -> None:
        """Run until no unit is left.

        Raises:
            SetAsideError: some units failed `MAX_ATTEMPTS` times; all others are done.
            ExtractError: no worker can be started, or units fail one after the other.
            ActstoreError: an error that every further attempt would raise again.
        """
        stalled_since = time.monotonic()
        try:
            while self._open:
                self._grow()
                self._feed()
                assert self._callers, f"nobody has {self._unit}s {sorted(self._open)[:_SHOWN]}"
                for call in self._fleet.ended(self._callers, _WAIT_S):
                    self._finish(call)
                    stalled_since = time.monotonic()
                self._watch()
                if time.monotonic() - stalled_since > _STALL_WARNING_S and not all(
                    slot.is_ready for slot in self._slots
                ):
                    self._warn_of_stall()
                    stalled_since = time.monotonic()
        finally:
            for slot in self._slots:
                self._fleet.remove(slot.worker)
        if self._set_aside:
            raise self._set_aside_error()

    def _set_aside_error(self) -> SetAsideError:
        shown = "; ".join(f"{unit}: {error}" for unit, error in sorted(self._set_aside.items())[:_SHOWN])
        more = f"; and {len(self._set_aside) - _SHOWN} more" if len(self._set_aside) > _SHOWN else ""
        n = len(self._set_aside)
        return SetAsideError(
            f"{n} {self._unit}{'' if n == 1 else 's'} failed {MAX_ATTEMPTS} times and {'is' if n == 1 else 'are'} "
            f"missing, all others are done ({shown}{more}); mend the cause and run the same command again"
        )

    def _warn_of_stall(self) -> None:
        n = sum(not slot.is_ready for slot in self._slots)
        workers = "1 worker has" if n == 1 else f"{n} workers have"
        _log.warning("%s not started yet, waiting for %s", workers, self._fleet.wanting())

    def _any_ready(self) -> bool:
        return any(slot.is_ready for slot in self._slots)

    def _grow(self) -> None:
        """Fill the room that the fleet has, as far as there are units; machines may join at any time."""
        now = time.monotonic()
        if now - self._grown_at < _GROWTH_S:
            return
        self._grown_at = now
        # At the beginning all units are pending. Later, one that is in hand needs no further worker.
        n_units = len(self._pending) + sum(bool(slot.units) for slot in self._slots)
        while len(self._slots) < min(self._fleet.size(), n_units):
            self._slots.append(self._filled())

    def _filled(self) -> _Slot:
        slot = _Slot(self._fleet.add())
        self._call(slot, "place")
        return slot

    def _call(self, slot: _Slot, call: Call) -> None:
        pending = self._fleet.call(slot.worker, call)
        slot.calls[pending] = call
        self._callers[pending] = slot

    def _feed(self) -> None:
        """Give every worker one unit to compute and the next ones in advance, one round at a time."""
        for depth in range(1, SEGMENTS_IN_FLIGHT + 1):
            for slot in self._slots:
                if slot.is_ready and len(slot.units) < depth and (unit := self._next()) is not None:
                    self._give(slot, unit)
        idle = [slot for slot in self._slots if slot.is_ready and not slot.units]
        if idle and not self._pending:
            for slot, unit in zip(idle, self._to_take_again(), strict=False):
                self._give(slot, unit)

    def _next(self) -> int | None:
        """The next unit; one that was given back may have ended after all."""
        while self._pending:
            unit = self._pending.popleft()
            if unit in self._open:
                return unit
        return None

    def _give(self, slot: _Slot, unit: int) -> None:
        if not slot.units:
            slot.silent_since = time.monotonic()
        slot.units.append(unit)
        self._call(slot, unit)

    def _to_take_again(self) -> list[int]:
        """Units that a worker has in hand, and another one will probably end earlier."""
        in_hand = Counter(unit for slot in self._slots for unit in slot.units)
        # What waits in the queue of a worker, the last one given of the longest queue first.
        queued = [slot for slot in self._slots if len(slot.units) > 1]
        units = [slot.units[-1] for slot in sorted(queued, key=lambda slot: -len(slot.units))]
        if self._pace.segment is not None:
            since = time.monotonic() - _LATE * self._pace.segment
            units += [slot.units[0] for slot in self._slots if slot.units and slot.silent_since < since]
        return [unit for unit in units if in_hand[unit] == 1]

    def _watch(self) -> None:
        """Look now and then for workers that hang."""
        now = time.monotonic()
        if now - self._watched_at >= _WAIT_S:
            self._watched_at = now
            for slot in list(self._slots):
                self._give_up_if_hung(slot)

    def _finish(self, call: Any) -> None:
        slot = self._callers.pop(call)
        what = slot.calls.pop(call)
        try:
            result = self._fleet.result(call)
        except WorkerRaisedError as error:
            self._raised(slot, what, error.cause)
        except WorkerLostError as error:
            # Whether it died, was killed for memory, lost its node or was never placed, the remedy is the same.
            self._replace(slot, what, error)
        else:
            self._succeed(slot, what, result)

    def _succeed(self, slot: _Slot, what: Call, result: Any) -> None:
        now = time.monotonic()
        if what == "place":
            self._placed(slot, *result)
        elif what == "start":
            self._pace.started(now - slot.silent_since)
            slot.is_ready = True
            self._failed_starts = 0
        else:
            self._pace.finished(now - slot.silent_since)
            slot.units.remove(what)
            slot.silent_since = slot.last_done = now
            self._n_failures = 0
            if what in self._open:
                self._open.remove(what)
                self._on_done(result)

    def _placed(self, slot: _Slot, host: str, pid: int) -> None:
        """Start a worker that has a place; its time counts from here on."""
        slot.where = f"the worker in process {pid} on {host}"
        slot.silent_since = time.monotonic()
        self._call(slot, "start")

    def _give_up_if_hung(self, slot: _Slot) -> None:
        """Replace a worker that is silent for too long: a stopped or hanging process fails no call."""
        silent = time.monotonic() - slot.silent_since
        # A finished call that was not fetched yet is a sign of life, too, since callers can be slow.
        if not slot.calls or silent <= self._deadline(slot) or self._fleet.ended(slot.calls, 0.0):
            return
        units = list(slot.units)
        for call in slot.calls:
            del self._callers[call]
        self._hangs.update(units)
        to_do = f"{self._unit}s {units} are given to others" if units else "another one is started"
        known = self._pace.segment if units else self._pace.start
        _log.warning(
            "%s was silent for %.0f s%s; %s",
            slot.where,
            silent,
            "" if known is None else f", where {known:.1f} s were the most before",
            to_do,
        )
        error = ExtractError(f"{slot.where} was silent for {silent:.0f} s")
        self._replace(slot, units[0] if units else "start", error)
        for unit in units[1:]:
            self._give_back(unit)

    def _deadline(self, slot: _Slot) -> float:
        """Seconds that a worker may be silent over what it has in hand."""
        if not slot.units:
            return self._pace.start_deadline(self._failed_starts)
        loads_again = 0 in slot.units
        n_attempts = max(self._hangs[unit] for unit in slot.units)
        deadline = self._pace.deadline(n_attempts, is_alone=False, loads_again=loads_again)
        others = [other for other in self._slots if other is not slot and other.is_ready]
        late = slot.silent_since + deadline / 2
        if any(not other.units or other.last_done > late for other in others):
            return deadline
        return self._pace.deadline(n_attempts, is_alone=True, loads_again=loads_again)

    def _raised(self, slot: _Slot, what: Call, cause: Exception) -> None:
        """Replace a worker that has reported an error. It is replaced although it lives: a GPU in a bad state would
        fail every unit at once, and ask for the next one first.
        """
        if isinstance(cause, _PERMANENT):
            raise cause
        self._replace(slot, what, cause)

    def _replace(self, slot: _Slot, what: Call, error: Exception) -> None:
        """Give up a worker, whose calls all come here; the first of them refills its slot."""
        is_fault = not (isinstance(error, WorkerLostError) and error.was_preempted)
        is_first = slot in self._slots
        if is_first:
            # The worker may still live and hold its GPU. Its other calls come back as those of a dead worker.
            self._fleet.remove(slot.worker)
            _log.warning("a worker failed and is replaced: %s", _described(error))
            if not slot.is_ready and is_fault:
                self._count_start(error)
            self._slots[self._slots.index(slot)] = self._filled()
        if isinstance(what, int):
            # Only the first failed call is to blame; the others failed with their worker.
            if is_first and is_fault:
                self._count_attempt(what, error)
            self._give_back(what)

    def _give_back(self, unit: int) -> None:
        """Let another worker compute a unit, unless one has it already."""
        if unit in self._open and unit not in self._pending and not self._is_in_hand(unit):
            self._pending.append(unit)

    def _is_in_hand(self, unit: int) -> bool:
        return any(unit in slot.units for slot in self._slots)

    def _count_attempt(self, unit: int, cause: Exception) -> None:
        self._attempts[unit] += 1
        self._n_failures += 1
        if self._attempts[unit] >= MAX_ATTEMPTS and unit in self._open and not self._is_in_hand(unit):
            self._open.remove(unit)
            self._set_aside[unit] = _described(cause)
            _log.warning("%s %d failed %d times and is set aside", self._unit, unit, MAX_ATTEMPTS)
        if self._n_failures >= MAX_FAILURES and self._open:
            raise ExtractError(
                f"{self._n_failures} {self._unit}s failed one after the other, so the run is given up; the last one: "
                f"{_described(cause)}"
            ) from cause

    def _count_start(self, cause: Exception) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_ATTEMPTS and not self._any_ready():
            raise ExtractError(
                f"workers failed to start {MAX_ATTEMPTS} times in a row; the last time: {_described(cause)}"
            ) from cause


def _described(error: Exception) -> str:
    if isinstance(error, ActstoreError | WorkerLostError):
        return str(error)
    return f"{type(error).__name__}: {reason(error)}"
