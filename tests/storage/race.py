"""Eight processes let loose on one key after another."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

N_RACERS = 8
_LIMIT_S = 60.0


@contextlib.contextmanager
def racers(url: str) -> Iterator["Race"]:
    """Start them and wait until each has opened the storage. All are gone at the end; a hang ends them, too."""
    script = str(Path(__file__).with_name("racer.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, url, str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(N_RACERS)
    ]

    def kill() -> None:
        for process in processes:
            process.kill()

    watchdog = threading.Timer(_LIMIT_S, kill)
    watchdog.start()
    try:
        race = Race(processes)
        assert race.answers() == ["ready"] * N_RACERS
        yield race
    finally:
        watchdog.cancel()
        kill()
        for process in processes:
            process.communicate()


class Race:
    def __init__(self, processes: "Sequence[subprocess.Popen[str]]") -> None:
        self._processes = processes

    def run(self, line: str) -> list[str]:
        """Make all processes do the same at once, and return the answer of each."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return self.answers()

    def answers(self) -> list[str]:
        return [process.stdout.readline().strip() for process in self._processes if process.stdout]
