"""Memory that threads write to a socket."""

import asyncio
import contextlib
import os
import socket
import threading
import weakref
from typing import Final

import numpy as np
import pytest

from actstore.query.server.socket_writes import SocketWriter, WritingThreads, vectors_of

NBYTES: Final = 50_000
"""Less than any socket holds."""


def test_memory_outlives_whoever_waits_for_it() -> None:
    """A write that is cancelled in the midst of a turn: what the thread sends is not other memory by then."""
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


def test_descriptors_of_replies_are_bounded() -> None:
    """Slow clients cannot take those that health checks and files need."""
    threads = WritingThreads()
    mine, theirs = socket.socketpair()
    with mine, theirs, contextlib.ExitStack() as stack:
        for _ in range(128):
            stack.callback(SocketWriter(threads, mine.fileno(), 60).close)
        with pytest.raises(OSError, match="Too many open files"):
            SocketWriter(threads, mine.fileno(), 60)
        stack.close()
        SocketWriter(threads, mine.fileno(), 60).close()
