"""Calls of the C library that Python does not offer: mapping files at chosen addresses, and handling the signal of a
mapped file that became shorter. 64-bit Linux only.
"""

import ctypes
import mmap
import os
import sys
import threading
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
    """The layout of `struct sigaction` in glibc and musl on x86-64 and AArch64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def is_supported() -> bool:
    """Whether this platform is 64-bit Linux with a known C library."""
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
    libc.sigaction.argtypes = (ctypes.c_int, ctypes.POINTER(_Action), ctypes.POINTER(_Action))
    return libc


def _checked(address: int) -> int:
    if address == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return address


def reserve(nbytes: int) -> int:
    """Reserve addresses that nothing else will take. They cost no memory, and cannot be read yet.

    Returns:
        The first address, at the start of a page.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return _checked(_libc().mmap(None, nbytes, _PROT_NONE, flags, -1, 0))


def map_file(address: int, nbytes: int, file: int) -> None:
    """Map the first bytes of an open file, for reading, at reserved addresses. The file may be closed afterwards."""
    _checked(_libc().mmap(address, nbytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, file, 0))


def release(address: int, nbytes: int) -> None:
    """Unmap reserved addresses and everything that is mapped there."""
    _libc().munmap(address, nbytes)


OnFault = Callable[[int], tuple[int, int] | None]
"""Called with the address at which a file ended too early. Returns (start, bytes) of the listener's memory if the
address is in it, otherwise None.
"""

_SIG_DFL: Final = 0


class _Listeners:
    """The listeners of the signal, and the handler that calls them."""

    def __init__(self) -> None:
        self.all: tuple[OnFault, ...] = ()
        """A new tuple at each change, since a signal can come while this one is iterated over."""
        self._handler = _Handler(self._on_signal)
        self._action = _Action(handler=ctypes.cast(self._handler, ctypes.c_void_p), flags=_SA_SIGINFO)
        self._before = _Action()
        self._has_given_way = False
        self._begin_process()
        os.register_at_fork(after_in_child=self._begin_process)

    def _begin_process(self) -> None:
        self._changing = threading.RLock()

    def change(self, to: Callable[[tuple[OnFault, ...]], tuple[OnFault, ...]]) -> None:
        """Replace all listeners at once."""
        with self._changing:
            while True:
                before = self.all
                after = to(before)
                if (
                    self.all is before
                ):  # fails if a garbage collection in this very thread has changed them meanwhile
                    self.all = after
                    return

    def install(self) -> None:
        """Install the handler, or install it again: others may have set theirs since, as `faulthandler.enable` does."""
        now = _Action()
        _set_action(None, now)
        if now.handler != self._action.handler:
            self._has_given_way = False
            self._before = now
            _set_action(self._action, None)

    def _on_signal(self, _signal: int, info: int, _context: int) -> None:
        address = ctypes.c_void_p.from_address(info + _ADDRESS_IN_SIGINFO).value or 0
        for listener in self.all:
            memory = listener(address)
            if memory is not None:
                # All of the memory at once: one map per page could exceed the system's limit.
                begin, nbytes = memory
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
                if _libc().mmap(begin, nbytes, mmap.PROT_READ, flags, -1, 0) == begin:
                    return
        # Not ours: restore the handler from before, and let the instruction raise the signal again. If that handler was
        # set after ours and passes the signal back to us, nobody is left to handle it.
        _set_action(_Action(handler=_SIG_DFL) if self._has_given_way else self._before, None)
        self._has_given_way = True


def _set_action(action: _Action | None, before: _Action | None) -> None:
    new, old = (None if an_action is None else ctypes.byref(an_action) for an_action in (action, before))
    if _libc().sigaction(_SIGBUS, new, old):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


@cache
def _listeners() -> _Listeners:
    return _Listeners()


def listen(on_fault: OnFault) -> None:
    """Call a listener when a read of mapped memory fails since the file has become shorter; the process does not end
    then.

    All of the listener's memory becomes zeros, and the read goes on, so a reader has to check afterwards whether this
    happened. The listener is called in the reading thread, in the midst of the read, so it may only take note.
    """
    listeners = _listeners()
    listeners.change(lambda present: (*present, on_fault))
    listeners.install()


def ensure_handler() -> None:
    """Install the handler again in case another library has replaced it; this takes a microsecond."""
    _listeners().install()


def forget(on_fault: OnFault) -> None:
    """Stop calling this listener."""
    _listeners().change(lambda present: tuple(listener for listener in present if listener is not on_fault))
