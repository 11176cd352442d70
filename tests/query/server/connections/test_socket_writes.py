"""Threads write memory to a socket."""

import asyncio
import contextlib
import gc
import itertools
import os
import socket
import threading
import time
import weakref
from typing import Final

import numpy as np
import pytest

from actstore.query.server.connections.socket_writes import (
    ConnectionGoneError,
    SocketWriter,
    WritingThreads,
    vectors_of,
)

NBYTES: Final = 50_000
"""Fewer bytes than any socket holds."""


def test_memory_outlives_whoever_waits_for_it() -> None:
    """A write is cancelled during a turn: the memory that the thread sends is not reused by then."""
    threads = WritingThreads()
    data = np.random.default_rng(0).bytes(NBYTES)
    memory = np.frombuffer(bytearray(data), np.uint8)
    reference = weakref.ref(memory)
    is_gone = threading.Event()
    weakref.finalize(memory, is_gone.set)
    mine, theirs = socket.socketpair()

    async def cancelled() -> None:
        nonlocal memory
        writer = SocketWriter(threads, mine.fileno(), 60)
        write = asyncio.create_task(writer.write(vectors_of(memory.data)))
        del memory
        while writer._turn is None or not writer._turn.running():
            await asyncio.sleep(0)
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
        writer.close()
        del write

    with mine, theirs, contextlib.ExitStack() as stack:
        mine.setblocking(False)
        for _ in range(os.cpu_count() or 1):
            stack.enter_context(threads._cores)
        asyncio.run(cancelled())
        assert reference() is not None
        stack.close()
        theirs.settimeout(60)
        assert theirs.recv(NBYTES, socket.MSG_WAITALL) == data
        assert is_gone.wait(60)


def test_memory_is_free_once_the_client_is_gone() -> None:
    """This holds even if a thread noticed first, and without a run of the garbage collector."""
    threads = WritingThreads()
    memory = np.frombuffer(bytearray(1 << 20), np.uint8)
    reference = weakref.ref(memory)
    mine, theirs = socket.socketpair()
    theirs.close()

    async def write() -> None:
        nonlocal memory
        writer = SocketWriter(threads, mine.fileno(), 60)
        vectors = vectors_of(memory.data)
        del memory
        with contextlib.suppress(ConnectionGoneError):
            await writer.write(vectors)
            pytest.fail("there was nobody to write to")
        writer.close()

    gc.disable()
    try:
        with mine:
            mine.setblocking(False)
            asyncio.run(write())
        # The thread drops its references a moment later.
        deadline = time.monotonic() + 60
        while reference() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("n_writers", [1, 3])
def test_all_of_it_arrives(n_writers: int) -> None:
    """Long and short pieces, more than a socket holds, in large calls for one client and in small ones for several."""
    threads = WritingThreads()
    data = np.random.default_rng(0).integers(0, 256, 12 << 20, np.uint8)
    sizes = [5 << 20, *[1] * 2_000, *[4096] * 900, 1 << 20]
    starts = np.cumsum([0, *sizes])
    rest = data[int(starts[-1]) :]
    table = np.array(
        [[data.ctypes.data + int(at), size] for at, size in zip(starts, sizes, strict=False)], np.uint64
    )
    mine, theirs = socket.socketpair()
    received = bytearray()

    def read() -> None:
        while more := theirs.recv(100_000):
            received.extend(more)

    async def write() -> None:
        writers = [SocketWriter(threads, mine.fileno(), 60) for _ in range(n_writers)]
        await writers[0].write(itertools.chain([table], vectors_of(rest.data)))
        assert writers[0].nbytes == data.nbytes
        for writer in writers:
            writer.close()

    reader = threading.Thread(target=read)
    reader.start()
    with theirs:
        with mine:
            mine.setblocking(False)
            asyncio.run(write())
            mine.shutdown(socket.SHUT_WR)
        reader.join()
    assert bytes(received) == data.tobytes()


def test_descriptors_of_replies_are_bounded() -> None:
    """Slow clients cannot take the descriptors that health checks and files need."""
    threads = WritingThreads()
    mine, theirs = socket.socketpair()
    with mine, theirs, contextlib.ExitStack() as stack:
        for _ in range(128):
            stack.callback(SocketWriter(threads, mine.fileno(), 60).close)
        with pytest.raises(OSError, match="Too many open files"):
            SocketWriter(threads, mine.fileno(), 60)
        stack.close()
        SocketWriter(threads, mine.fileno(), 60).close()
