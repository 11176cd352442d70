"""Opens files below a folder; no link leads out of it, even one that appears meanwhile."""

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

PATH_ONLY: Final = getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK) | os.O_CLOEXEC
"""Flags to look at a file without opening its contents: unreadable files, pipes and devices do not matter."""
FILE: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""Flags to read a file. Without O_NONBLOCK, opening a pipe would wait for a writer."""
FOLDER: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_OPENAT2: Final = 437
"""Number of the system call, the same on all architectures of Linux."""
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_BENEATH: Final = 0x08
"""Source: https://man7.org/linux/man-pages/man2/openat2.2.html"""
_MAX_LINKS: Final = 40
"""Links that are followed at most, as in Linux."""
_ABSENT: Final = (errno.ENOSYS, errno.EPERM)
"""Errors of Linux before 5.6, and of sandboxes that do not know the call."""


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(folder: int, path: str, flags: int, allowed: Sequence[Path] = ()) -> int:
    """Open a path below a folder, and return a descriptor. Lookup and opening are one step.

    Args:
        folder: descriptor of the folder.
        path: path below the folder, or ``.``.
        flags: one of `PATH_ONLY`, `FILE` and `FOLDER`.
        allowed: folders that absolute links may lead into.

    Raises:
        OSError: the path cannot be opened; with EXDEV where a link leads elsewhere.
    """
    if sys.platform == "linux":
        how = _How(flags, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
        descriptor = _syscall(_OPENAT2, folder, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
        if descriptor >= 0:
            return int(descriptor)
        number = ctypes.get_errno()
        # EAGAIN: a folder was renamed meanwhile.
        if number not in (*_ABSENT, errno.EAGAIN, errno.EXDEV) or (number == errno.EXDEV and not allowed):
            raise OSError(number, os.strerror(number), path)
    return walk_beneath(folder, path, flags, allowed)


def _system_call() -> "ctypes._NamedFuncPointer":
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    function.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
    return function


_syscall: Final = _system_call()


def walk_beneath(folder: int, path: str, flags: int, allowed: Sequence[Path] = ()) -> int:
    """`open_beneath` without the system call: it opens one name after the other, and the system follows no link."""
    names, n_links = path.split("/")[::-1], 0
    folders = [os.dup(folder)]
    try:
        while names:
            name = names.pop()
            if name in ("", "."):
                continue
            if name == "..":
                if len(folders) == 1:
                    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
                os.close(folders.pop())
                continue
            target = _target(folders[-1], name)
            if target is None:
                wanted = PATH_ONLY | os.O_DIRECTORY if names else flags
                folders.append(os.open(name, wanted | os.O_NOFOLLOW, dir_fd=folders[-1]))
                continue
            n_links += 1
            if n_links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            if target.startswith("/"):
                start, target = _allowed_folder(target, allowed, path)
                for descriptor in folders:
                    os.close(descriptor)
                folders = []
                folders.append(os.open(start, PATH_ONLY | os.O_DIRECTORY))
            names.extend(target.split("/")[::-1])
        opened = folders.pop() if len(folders) > 1 else os.open(".", flags, dir_fd=folders[0])
        if stat.S_ISLNK(os.fstat(opened).st_mode):  # a link that was put there after readlink
            os.close(opened)
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        return opened
    finally:
        for descriptor in folders:
            os.close(descriptor)


def _target(folder: int, name: str) -> str | None:
    """Target of a link; None for anything else."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def _allowed_folder(target: str, allowed: Sequence[Path], path: str) -> tuple[Path, str]:
    """The allowed folder that an absolute link leads into, and the path from there."""
    for folder in allowed:
        if target == str(folder) or target.startswith(f"{folder}/"):
            return folder, target.removeprefix(str(folder))
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
