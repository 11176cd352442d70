"""Eight processes let loose on one key after another."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from tests.commands import Conversation

N_RACERS = 8
_LIMIT_S = 60.0
_FORKED: Final = "import sys; from tests.storage.racer import main; main(*sys.argv[1:])"
_NEW: Final = """
import os, sys
os.execv(sys.executable, [sys.executable, "-m", "tests.storage.racer", *sys.argv[1:]])
"""


@contextlib.contextmanager
def racers(url: str, *, are_new: bool = False) -> Iterator["Race"]:
    """Start them and wait until each has opened the storage. All are gone at the end; a hang ends them, too.

    Args:
        url: of the storage.
        are_new: whether each is a new program, which heeds the variables of the dynamic linker.
    """
    processes = [Conversation(url, str(i), code=_NEW if are_new else _FORKED) for i in range(N_RACERS)]

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
        for process in processes:
            process.end()


class Race:
    def __init__(self, processes: Sequence[Conversation]) -> None:
        self._processes = processes

    def run(self, line: str) -> list[str]:
        """Make all processes do the same at once, and return the answer of each."""
        for process in self._processes:
            process.say(line)
        return self.answers()

    def answers(self) -> list[str]:
        return [process.answer() for process in self._processes]
