"""Extractions in processes of their own, which can be killed. A server with all imports done forks them, so they start
fast.
"""

import os
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from tests.commands import FORKS, start_server
from tests.faults.crash import Point, Step, Watch

_LIMIT_S = 120.0
_EXIT_S = 30.0
"""Seconds from the last message of a process to its end."""

Stop = Literal["start", "planned"]


@dataclass(frozen=True)
class Outcome:
    """Result of a process."""

    exitcode: int
    report: dict[str, Any] = field(default_factory=dict)
    """Report of the extraction, if it ended well."""
    error: str = ""
    """Class and text of the error that it raised."""
    steps: tuple[Step, ...] = ()
    missed: tuple[str, ...] = ()
    peak_nbytes: int = 0
    """Bytes of memory that it held at most."""
    seconds: float = 0.0
    """Seconds from the start of planning to the end."""


class Child:
    """A process that plans and runs one extraction, with one thread for torch."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        *,
        stop: Stop | None = None,
        watch: bool = False,
        point: Point | None = None,
    ) -> None:
        """Start the process.

        Args:
            fields: fields of the job.
            environment: variables in the place of those that begin with ``AWS_`` or ``ACTSTORE_``.
            stop: where the process waits for `go`.
            watch: whether to report the steps on the disk.
            point: where to crash.
        """
        start_server()
        self._connection, theirs = FORKS.Pipe()
        is_watched = watch or point is not None
        arguments = (dict(fields), dict(environment or {}), theirs, stop, is_watched, point)
        self._process = FORKS.Process(target=_main, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.started = time.monotonic()

    def reached(self) -> None:
        """Wait until the process stands at its stop."""
        assert self._connection.poll(_LIMIT_S), "the process has not come to its stop"
        assert self._connection.recv() == "stopped"

    def go(self) -> None:
        self._connection.send("go")

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        if self._process.is_alive():
            os.kill(self.pid, signal.SIGKILL)

    def ends_within(self, seconds: float) -> bool:
        self._process.join(max(0.0, seconds))
        return not self._process.is_alive()

    def outcome(self, limit_s: float = _LIMIT_S) -> Outcome:
        """Wait for the end of the process; one that does not end in time is killed, and the test fails."""
        outcome, is_over = None, True
        try:
            is_over = self._connection.poll(max(0.0, limit_s))
            outcome = self._connection.recv() if is_over else None
        except (EOFError, ConnectionResetError):
            pass  # killed
        self._process.join(_EXIT_S if is_over else 0)
        is_late = self._process.is_alive()
        self.kill()
        self._process.join()
        self._connection.close()
        assert not is_late, f"the process did not end within {limit_s} s"
        assert self._process.exitcode is not None
        return outcome if isinstance(outcome, Outcome) else Outcome(self._process.exitcode)


def run(fields: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Outcome:
    """Run an extraction that must end well."""
    outcome = Child(fields, environment).outcome()
    assert outcome.exitcode == 0, outcome
    assert not outcome.error, outcome.error
    return outcome


def _main(
    fields: dict[str, Any],
    environment: dict[str, str],
    connection: Connection,
    stop: Stop | None,
    is_watched: bool,
    point: Point | None,
) -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    import actstore
    from actstore.errors import ActstoreError

    for name in [name for name in os.environ if name.startswith(("AWS_", "ACTSTORE_"))]:
        del os.environ[name]
    os.environ.update(environment)
    torch.set_num_threads(1)
    disable_progress_bar()
    watch = Watch(Path(fields["out"]), point) if is_watched else None
    report: dict[str, Any] = {}
    error = ""

    def reach(place: Stop) -> None:
        if stop == place:
            connection.send("stopped")
            connection.recv()

    reach("start")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
    started = time.monotonic()
    try:
        planned = actstore.plan(**fields)
        reach("planned")
        report = actstore.extract(planned).to_dict()
    except ActstoreError as raised:
        error = f"{type(raised).__name__}: {raised}"
    except Exception:  # noqa: BLE001
        error = traceback.format_exc()  # a bug of ours: the traceback shows where
    seconds = time.monotonic() - started
    connection.send(
        Outcome(
            exitcode=0,
            report=report,
            error=error,
            steps=tuple(watch.steps) if watch else (),
            missed=tuple(watch.missed) if watch else (),
            peak_nbytes=_peak_nbytes(),
            seconds=seconds,
        )
    )
    connection.close()


def _peak_nbytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
