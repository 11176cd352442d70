"""The processes of workers that a test has started, to stop or kill them."""

import os
from pathlib import Path


def worker_pids() -> list[int]:
    """Actors of clusters that this process or a child of it has started on this machine; not those of others."""
    parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdecimal()}
    pids = []
    for pid in sorted(parents):
        above: int | None = pid
        while above not in (None, os.getpid()):
            above = parents.get(above or 0)
        if above is not None and _is_actor(pid):
            pids.append(pid)
    return pids


def _parent(folder: Path) -> int | None:
    try:
        return int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def _is_actor(pid: int) -> bool:
    try:
        return b"ray::WorkerActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
