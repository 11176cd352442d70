"""The holder of a lease, described so that its machine can tell whether it is still alive."""

import os
import platform
import time
from functools import cache
from pathlib import Path

from actstore.store.format.document import Document


class Holder(Document):
    """A process. All fields but ``host`` and ``pid`` are for `is_alive`; they are empty or 0 if the system does not
    tell.
    """

    host: str = ""
    machine: str = ""
    """An id that differs between machines, between boots of one, and between containers with process numbers of their
    own.
    """
    pid: int = 0
    began: int = 0
    """Start time of the process in ticks of its machine, since process numbers are reused."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "an unknown process"


def this_process() -> Holder:
    """Describe this process."""
    pid = os.getpid()
    state = _state(pid)
    return Holder(host=platform.node(), machine=_machine(), pid=pid, began=0 if state is None else state[1])


def is_alive(holder: Holder) -> bool | None:
    """Whether a process is alive, or None if that cannot be told: it is on another machine, hidden from us, or stopped
    (``kill -STOP``, a debugger).
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
    """Seconds since a moment, by the clock of this machine, which can differ from that of another one."""
    return time.time() - moment


def now() -> float:
    """Seconds since 1970, rounded to three digits."""
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
    """The state letter and start time of a process; None if there is no such process, it is hidden, or this is not
    Linux.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name of the program is in parentheses, and may contain parentheses itself.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def _is_there(pid: int) -> bool:
    """Whether a process with this number exists, even if ``/proc`` hides it as another user's (``hidepid``)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's process
    return True
