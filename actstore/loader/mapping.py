"""Calls of the C library that Python does not offer: files mapped at chosen addresses, and the signal of a map whose
file became shorter. 64-bit Linux only.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Final

_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_PROT_NONE: Final = 0
_FAILED: Final = ctypes.c_void_p(-1).value
_SIGBUS: Final = 7
_SA_SIGINFO: Final = 4
_ADDRESS_IN_SIGINFO: Final = 16
"""Bytes from the start of `siginfo_t` to `si_addr`, in every 64-bit Linux."""

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """`struct sigaction` of glibc and musl on x86-64 and AArch64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def is_supported() -> bool:
    """Whether this platform is the one that this file is about."""
    return sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8 and os.uname().machine in _MACHINES


_MACHINES: Final = ("x86_64", "aarch64")


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.sigaction.argtypes = (ctypes.c_int, ctypes.POINTER(_Action), ctypes.POINTER(_Action))
    return libc


def _checked(address: int) -> int:
    if address == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return address


def reserve(nbytes: int) -> int:
    """Addresses that nothing else will take. They cost no memory, and cannot be read yet.

    Returns:
        The first one, at the start of a page.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return _checked(_libc().mmap(None, nbytes, _PROT_NONE, flags, -1, 0))


def map_file(address: int, nbytes: int, file: int) -> None:
    """The first bytes of an open file, for reading, at addresses that are reserved. The file may be closed then."""
    _checked(_libc().mmap(address, nbytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, file, 0))


def release(address: int, nbytes: int) -> None:
    """Give up what was reserved, with all that is mapped there."""
    _libc().munmap(address, nbytes)


def advise(address: int, nbytes: int, advice: int) -> None:
    """`madvise`, such as with `mmap.MADV_RANDOM`; a system that does not know the advice ignores it."""
    _libc().madvise(address, nbytes, advice)


OnFault = Callable[[int], bool]
"""Told at which address a file ended too early; whether that address is its own."""

_listeners: list[OnFault] = []
_installed: list[Any] = []
"""The handler that was set, which must not be collected, and the one before it."""


def listen(on_fault: OnFault) -> None:
    """Be told when a read of mapped memory finds that the file has become shorter, in place of the end of the process.

    The page is filled with zeros then, and the read goes on: whoever reads has to ask afterwards whether it happened.
    The listener is called in the thread that reads, in the midst of it, so it may do no more than to take note.
    """
    _listeners.append(on_fault)
    if not _installed:
        handler = _Handler(_on_signal)
        action = _Action(handler=ctypes.cast(handler, ctypes.c_void_p), flags=_SA_SIGINFO)
        before = _Action()
        _installed.extend((handler, before))
        if _libc().sigaction(_SIGBUS, ctypes.byref(action), ctypes.byref(before)):
            _installed.clear()
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


def forget(on_fault: OnFault) -> None:
    """No longer tell this listener."""
    _listeners.remove(on_fault)


def _on_signal(_signal: int, info: int, _context: int) -> None:
    address = ctypes.c_void_p.from_address(info + _ADDRESS_IN_SIGINFO).value or 0
    page = address - address % mmap.PAGESIZE
    if any(listener(address) for listener in _listeners):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        if _libc().mmap(page, mmap.PAGESIZE, mmap.PROT_READ, flags, -1, 0) == page:
            return
    # Not ours: the same instruction comes to the same signal again, and to the handler from before.
    _libc().sigaction(_SIGBUS, ctypes.byref(_installed[1]), None)
