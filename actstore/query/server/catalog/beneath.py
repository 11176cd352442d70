"""Files opened below a folder: no link leads out of it, whoever puts one there meanwhile."""

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

PATH_ONLY: Final = getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK) | os.O_CLOEXEC
"""Flags for what is only to be looked at: a file that cannot be read, a pipe or a device has no say in it."""
FILE: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""Flags for what is to be read. Whoever opens a pipe would wait for somebody to write, but for O_NONBLOCK."""
FOLDER: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_OPENAT2: Final = 437
"""Number of the system call, on every architecture that Linux has had since."""
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_BENEATH: Final = 0x08
"""Source: https://man7.org/linux/man-pages/man2/openat2.2.html"""
_MAX_LINKS: Final = 40
"""As Linux has it."""
_ABSENT: Final = (errno.ENOSYS, errno.EPERM)
"""Linux before 5.6, and sandboxes that do not know the call."""


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(folder: int, path: str, flags: int, allowed: Sequence[Path] = ()) -> int:
    """A descriptor of what has this name below a folder. Looking up and opening are one step.

    Args:
        folder: descriptor of the folder.
        path: below it, or ``.``.
        flags: one of `PATH_ONLY`, `FILE` and `FOLDER`.
        allowed: folders that absolute links may lead into.

    Raises:
        OSError: it cannot be opened; with EXDEV where a link leads elsewhere.
    """
    if sys.platform == "linux":
        how = _How(flags, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
        found = _syscall(_OPENAT2, folder, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
        if found >= 0:
            return int(found)
        number = ctypes.get_errno()
        # EAGAIN: somebody renamed a folder meanwhile.
        if number not in (*_ABSENT, errno.EAGAIN, errno.EXDEV) or (number == errno.EXDEV and not allowed):
            raise OSError(number, os.strerror(number), path)
    return walk_beneath(folder, path, flags, allowed)


def _system_call() -> "ctypes._NamedFuncPointer":
    found = ctypes.CDLL(None, use_errno=True).syscall
    found.restype = ctypes.c_long
    found.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
    return found


_syscall: Final = _system_call()


def walk_beneath(folder: int, path: str, flags: int, allowed: Sequence[Path] = ()) -> int:
    """`open_beneath` where there is no system call for it: one name after the other, no link followed by the system."""
    todo, n_links = path.split("/")[::-1], 0
    way = [os.dup(folder)]
    try:
        while todo:
            name = todo.pop()
            if name in ("", "."):
                continue
            if name == "..":
                if len(way) == 1:
                    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
                os.close(way.pop())
                continue
            target = _target(way[-1], name)
            if target is None:
                wanted = PATH_ONLY | os.O_DIRECTORY if todo else flags
                way.append(os.open(name, wanted | os.O_NOFOLLOW, dir_fd=way[-1]))
                continue
            n_links += 1
            if n_links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            if target.startswith("/"):
                entry, target = _entry(target, allowed, path)
                for descriptor in way:
                    os.close(descriptor)
                way = []
                way.append(os.open(entry, PATH_ONLY | os.O_DIRECTORY))
            todo.extend(target.split("/")[::-1])
        found = way.pop() if len(way) > 1 else os.open(".", flags, dir_fd=way[0])
        if stat.S_ISLNK(os.fstat(found).st_mode):  # put there since it was looked at
            os.close(found)
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        return found
    finally:
        for descriptor in way:
            os.close(descriptor)


def _target(folder: int, name: str) -> str | None:
    """Where a link leads; None for anything else."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def _entry(target: str, allowed: Sequence[Path], path: str) -> tuple[Path, str]:
    """The folder that an absolute link may lead into, and the way from there."""
    for folder in allowed:
        if target == str(folder) or target.startswith(f"{folder}/"):
            return folder, target.removeprefix(str(folder))
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
