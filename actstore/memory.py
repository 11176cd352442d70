"""Amount of memory, total and free: of this machine, of the container of this process, and of a GPU."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_CGROUP: Final = Path("/sys/fs/cgroup")


def total_nbytes() -> int:
    """Memory of this machine in bytes, or the limit of the container if that is lower."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, _container_limit() or machine)


def free_nbytes(device: "torch.device") -> int:
    """Free memory of a device in bytes; on a CPU, the memory that this process may still take.

    Files that the kernel caches in memory count as free where it reports their size.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    free = _fields(Path("/proc/meminfo")).get("MemAvailable:")
    # Without /proc the memory in use is not known; half of the total is a cautious guess for one model.
    machine = total_nbytes() // 2 if free is None else free * 1024
    limit = _container_limit()
    return machine if limit is None else min(machine, limit - _container_used())


def _container_limit() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
    except OSError:
        return None
    return int(limit) if limit.isdecimal() else None  # else it is "max"


def _container_used() -> int:
    used = _fields(_CGROUP / "memory.stat")
    return used.get("anon", 0) + used.get("kernel", 0) + used.get("shmem", 0)


def _fields(file: Path) -> dict[str, int]:
    """Numbers by name, from a file with one pair a line; empty if there is no such file."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}
