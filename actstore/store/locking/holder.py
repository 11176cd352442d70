"""Who holds a lease: enough of a process to tell, on the same machine, whether it still lives."""

import os
import platform
import time
from functools import cache
from pathlib import Path

from actstore.store.format.document import Document


class Holder(Document):
    """A process. All but ``host`` and ``pid`` are for `is_alive`; empty or 0 where the system does not tell."""

    host: str = ""
    machine: str = ""
    """Differs between machines, between starts of one, and between containers that number processes on their own."""
    pid: int = 0
    began: int = 0
    """When the process began, in ticks of its machine: numbers of processes are given out again."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "an unknown process"


def this_process() -> Holder:
    """The one that asks."""
    pid = os.getpid()
    state = _state(pid)
    return Holder(host=platform.node(), machine=_machine(), pid=pid, began=0 if state is None else state[1])


def is_alive(holder: Holder) -> bool | None:
    """Whether a process runs, from the machine that it is on; None if that is another one, or the process is stopped
    (``kill -STOP``, a debugger) and nobody knows whether it goes on, or is hidden from us.
    """
    if not holder.machine or holder.machine != _machine() or not holder.began:
        return None
    state = _state(holder.pid)
    if state is None:
        return None if _is_there(holder.pid) else False
    if state[1] != holder.began or state[0] in "ZX":
        return False
    return None if state[0] in "Tt" else True


def seconds_since(moment: float) -> float:
    """By the clock of this machine, which that of another one can differ from."""
    return time.time() - moment


def now() -> float:
    """Seconds since 1970, to three digits."""
    return round(time.time(), 3)


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:  # not Linux
        return ""
    return f"{platform.node()} {boot} {namespace}"


def _state(pid: int) -> tuple[str, int] | None:
    """The letter of its state, and when it began; None if there is no such process, or it is hidden, or this is not
    Linux.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name of the program is in parentheses, and can have any in itself.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def _is_there(pid: int) -> bool:
    """Whether there is a process of this number, though ``/proc`` may not show it: that of another user can be hidden
    (``hidepid``).
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True
