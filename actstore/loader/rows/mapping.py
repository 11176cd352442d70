"""Calls of the C library that Python does not offer: files mapped at chosen addresses, and the signal of a map whose
file became shorter. 64-bit Linux only.
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


OnFault = Callable[[int], tuple[int, int] | None]
"""Told at which address a file ended too early. If that is its own: where its memory begins, and how long it is."""

_SIG_DFL: Final = 0


class _Listeners:
    """Who is told of the signal, and the handler that tells them."""

    def __init__(self) -> None:
        self.all: tuple[OnFault, ...] = ()
        """Another tuple with each change, as a signal can come while somebody goes through it."""
        self._handler = _Handler(self._on_signal)
        self._action = _Action(handler=ctypes.cast(self._handler, ctypes.c_void_p), flags=_SA_SIGINFO)
        self._before = _Action()
        self._has_given_way = False
        self._begin_process()
        os.register_at_fork(after_in_child=self._begin_process)

    def _begin_process(self) -> None:
        self._changing = threading.RLock()

    def change(self, to: Callable[[tuple[OnFault, ...]], tuple[OnFault, ...]]) -> None:
        """Replace all of them at once."""
        with self._changing:
            while True:
                before = self.all
                after = to(before)
                if (
                    self.all is before
                ):  # else a collection in this very thread has made one forgotten meanwhile
                    self.all = after
                    return

    def install(self) -> None:
        """See that the handler is ours. Others may have set theirs since, as `faulthandler.enable` does."""
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
                # All of it at once: a map for each page could be more than the system allows.
                begin, nbytes = memory
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
                if _libc().mmap(begin, nbytes, mmap.PROT_READ, flags, -1, 0) == begin:
                    return
        # Not ours: the same instruction comes to the same signal again, and to the handler from before. If that one
        # hands it on to us, as one does that was set after ours, nobody is left.
        _set_action(_Action(handler=_SIG_DFL) if self._has_given_way else self._before, None)
        self._has_given_way = True


def _set_action(action: _Action | None, before: _Action | None) -> None:
    new, old = (None if each is None else ctypes.byref(each) for each in (action, before))
    if _libc().sigaction(_SIGBUS, new, old):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


@cache
def _listeners() -> _Listeners:
    return _Listeners()


def listen(on_fault: OnFault) -> None:
    """Be told when a read of mapped memory finds that the file has become shorter, in place of the end of the process.

    All of the listener's memory is zeros then, and the read goes on: whoever reads has to ask afterwards whether it
    happened.
    The listener is called in the thread that reads, in the midst of it, so it may do no more than to take note.
    """
    listeners = _listeners()
    listeners.change(lambda present: (*present, on_fault))
    listeners.install()


def still_listens() -> None:
    """See to it that listeners are told even if another library has taken the signal since; it takes a microsecond."""
    _listeners().install()


def forget(on_fault: OnFault) -> None:
    """No longer tell this listener."""
    _listeners().change(lambda present: tuple(each for each in present if each is not on_fault))
