"""Writes large replies from memory to the socket of a connection, in threads, past the transport of the event loop.

The loop is free for other requests meanwhile, several connections are served on as many cores, and rows that lie
scattered in mapped files need not be gathered first.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
import select
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.uint64]
"""Address and length of pieces of memory, [n, 2]: the `struct iovec` of 64-bit systems."""

_N_THREADS: Final = 16
"""Number of threads: more than there are cores, as some wait for a disk. No more than there are cores write at once."""
_NICE: Final = 10
"""Niceness of the threads, 0 to 19: they wait where other threads of this process have work for a core."""
_MAX_VECTORS: Final = 1024
"""Vectors in one call: the system takes no more."""
_CALL_NBYTES: Final = 4 << 20
_CALL_OF_MANY_NBYTES: Final = 256 << 10
"""Bytes in one call: the system gives the core to nobody else until it has copied them. Large calls are faster by a
tenth or two; where several clients take large replies, others wait half as long for a small one with small calls.
"""
_FEW: Final = 2
"""Large replies at once that still count as few: a loader requests the next one while it takes one. A write keeps its
size of calls to the end of a batch or of a file.
"""
_VECTOR_NBYTES: Final = 16
_PATIENCE_MS: Final = 2
"""Milliseconds that a thread waits for a client to take more, before it turns to another one."""
_TURN_S: Final = 0.05
"""Seconds after which a thread turns to another client in any case."""
_MAX_WRITERS: Final = 128
"""Descriptors that replies duplicate at most: half of what `Room` leaves free. Slow clients could otherwise take all
descriptors from files and health checks; further replies go through the transport.
"""
SLOWEST: Final = 8_000
"""Bytes a second that a client must take at least."""


class ConnectionGoneError(Exception):
    """Raised when the client hung up in the middle of a reply."""


@cache
def _writev() -> Any:
    function = ctypes.CDLL(None, use_errno=True).writev
    function.restype = ctypes.c_ssize_t
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    return function


def vectors_of(data: memoryview) -> Iterator[Vectors]:
    """The vector of contiguous memory, which the iterator keeps alive until it is asked for the next."""
    if data.nbytes:
        array = np.frombuffer(data, np.uint8)
        yield np.array([[array.ctypes.data, array.nbytes]], np.uint64)


class _Write:
    """A write of vectors that is under way."""

    def __init__(self, vectors: Iterator[Vectors]) -> None:
        self._vectors = vectors
        self._now: Vectors | None = None
        self.is_done = False
        self.nbytes = 0
        """Bytes that were written until now."""

    def _next(self, call_nbytes: int) -> None:
        self._now = None
        vectors = next((some for some in self._vectors if some[:, 1].any()), None)
        if vectors is None:
            self.is_done = True
            self._vectors = iter(())  # it must not hold memory that others wait for
            return
        self._now = _short(np.ascontiguousarray(vectors), call_nbytes)
        self._address = self._now.ctypes.data
        self._ends = np.cumsum(self._now[:, 1].astype(np.int64))
        # Which call each vector is in: as many bytes in each, or as many vectors, if these are small.
        calls = (self._ends - 1) // call_nbytes + np.arange(len(self._ends)) // _MAX_VECTORS
        stops = np.append(np.flatnonzero(np.diff(calls)) + 1, len(self._ends))
        self._calls = [(int(stop), int(self._ends[stop - 1])) for stop in stops[::-1]]
        """Number of vectors, and bytes, that are written after each remaining call; the next call is the last entry."""
        self._first = self._n = 0

    def push(self, file: int, cores: threading.Semaphore, call_nbytes: int) -> None:
        """Write to a socket until all is written, it is full, or the turn is over.

        Args:
            file: descriptor of the socket.
            cores: held while there is work for one.
            call_nbytes: bytes to write in one call of the system; it can be up to twice as many.

        Raises:
            ConnectionGoneError: the client hung up.
            OSError: memory cannot be read, as of a file that was truncated.
        """
        deadline = time.monotonic() + _TURN_S
        if self._now is None:
            self._next(call_nbytes)
        poll: select.poll | None = None
        while not self.is_done and time.monotonic() < deadline:
            with cores:
                is_full = self._write(file, deadline)
            if self._is_written:
                self._next(call_nbytes)
            elif is_full:
                if poll is None:
                    poll = select.poll()
                    poll.register(file, select.POLLOUT)
                if not poll.poll(_PATIENCE_MS):
                    return

    def _write(self, file: int, deadline: float) -> bool:
        """Write until these vectors are written or the turn is over; return whether the socket is full."""
        assert self._now is not None
        while not self._is_written and time.monotonic() < deadline:
            stop, end = self._calls[-1]
            n = _writev()(file, self._address + _VECTOR_NBYTES * self._first, stop - self._first)
            if n == end - self._n:
                self.nbytes += n
                self._first, self._n = stop, end
                self._calls.pop()
                continue
            if n >= 0:
                self._advance(n)
                continue
            error = ctypes.get_errno()
            if error == errno.EAGAIN:
                return True
            if error in (errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT):
                raise ConnectionGoneError(os.strerror(error))
            if error != errno.EINTR:
                raise OSError(error, os.strerror(error))
        return False

    @property
    def _is_written(self) -> bool:
        return self._now is not None and self._first == len(self._now)

    def _advance(self, n: int) -> None:
        """Note that the system took fewer bytes than were offered."""
        assert self._now is not None
        self.nbytes += n
        self._n += n
        self._first = int(np.searchsorted(self._ends, self._n, side="right"))
        left = int(self._ends[self._first]) - self._n
        vector = self._now[self._first]
        vector[0] += vector[1] - np.uint64(left)
        vector[1] = left


def _short(vectors: Vectors, nbytes: int) -> Vectors:
    """Split vectors into some of at most ``nbytes`` bytes each, over the same memory; the result is a copy."""
    n_parts = -(-vectors[:, 1].astype(np.int64) // nbytes)
    short = np.repeat(vectors, n_parts, axis=0)
    if len(short) > len(vectors):
        parts = np.arange(len(short)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
        before = (parts * nbytes).astype(np.uint64)
        short[:, 0] += before
        short[:, 1] = np.minimum(short[:, 1] - before, np.uint64(nbytes))
    return short


class WritingThreads:
    """The writing threads of a process. They yield to its other work: a client that is sent much waits longer anyway
    than one that is sent a few rows.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="writing", initializer=_be_nice)
        self._cores = threading.Semaphore(os.cpu_count() or 1)
        self._counting = threading.Lock()
        self._n_writers = 0

    def duplicate(self, file: int) -> int:
        """Duplicate the descriptor of a socket, until it is given to `close`.

        Raises:
            OSError: there are too many of them.
        """
        with self._counting:
            if self._n_writers == _MAX_WRITERS:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            same = os.dup(file)
            self._n_writers += 1
        return same

    def close(self, file: int) -> None:
        """Give a descriptor of `duplicate` back."""
        os.close(file)
        with self._counting:
            self._n_writers -= 1

    def submit(self, write: _Write, file: int) -> "Future[None]":
        """Write for one turn in a thread."""
        call_nbytes = _CALL_NBYTES if self._n_writers <= _FEW else _CALL_OF_MANY_NBYTES
        return self._executor.submit(write.push, file, self._cores, call_nbytes)


def _be_nice() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


class SocketWriter:
    """Writes to the socket of one connection, while nothing else does."""

    def __init__(self, threads: WritingThreads, file: int, stall_s: float) -> None:
        """
        Args:
            threads: threads that write.
            file: descriptor of the socket; this object uses one of its own for the same socket.
            stall_s: seconds to wait for a client that takes nothing.

        Raises:
            OSError: there are no descriptors left.
        """
        self._threads = threads
        self._file = threads.duplicate(file)
        self._stall_s = stall_s
        self._is_gone = False
        self._waiting: asyncio.Future[None] | None = None
        self._turn: Future[Any] | None = None
        self._begun = time.monotonic()
        self.nbytes = 0
        """Bytes that were written until now."""

    async def write(self, vectors: Iterator[Vectors]) -> None:
        """Write all vectors, one after the other; each is made, in a thread, when those before are written.

        Args:
            vectors: vectors that keep their memory alive, as a thread may write for a moment after this is cancelled.

        Raises:
            ConnectionGoneError: the client hung up.
            OSError: memory cannot be read.
            TimeoutError: the client takes nothing, or next to nothing.
        """
        write = _Write(vectors)
        before = self.nbytes
        while not write.is_done:
            n_written = write.nbytes
            self._turn = self._threads.submit(write, self._file)
            try:
                await asyncio.wrap_future(self._turn)
            except Exception:
                self._turn = (
                    None  # the turn, its error and this frame would keep each other, and the memory, alive
                )
                raise
            self.nbytes = before + write.nbytes
            if self._is_gone:
                raise ConnectionGoneError("the connection was closed")
            if not write.is_done and write.nbytes == n_written:
                await self._until_writable()
            if time.monotonic() - self._begun > self._stall_s + self.nbytes / SLOWEST:
                raise TimeoutError

    async def _until_writable(self) -> None:
        loop = asyncio.get_running_loop()
        waiting = self._waiting = loop.create_future()
        loop.add_writer(self._file, _wake, waiting)
        try:
            async with asyncio.timeout(self._stall_s):
                await waiting
        finally:
            loop.remove_writer(self._file)
            self._waiting = None

    def give_up(self) -> None:
        """Write no more, as the connection is gone. Called in the loop."""
        self._is_gone = True
        if self._waiting is not None:
            _wake(self._waiting)

    def close(self) -> None:
        """Give the descriptor back, but not while a thread may still write to it: its number could be that of another
        connection by then.
        """
        if self._turn is None:
            self._threads.close(self._file)
        else:
            self._turn.add_done_callback(lambda _turn: self._threads.close(self._file))


def _wake(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():
        waiting.set_result(None)
