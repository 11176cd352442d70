"""The process of a worker: it takes calls from the pool through a pipe, and answers them."""

import copy
import os
import platform
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from actstore.extraction.computing.worker import SEGMENTS_IN_FLIGHT
from actstore.extraction.pool.fleet import Call

if TYPE_CHECKING:
    from actstore.extraction.computing.executor import Computes, Spec


def serve(pipe: Connection, environment: Mapping[str, str], spec: "Spec[Any]") -> None:
    """Answer calls until the pool closes the pipe. The main function of the process.

    Each message is (number of the call, call), and each answer (number of the call, result, error), one of them None.

    Args:
        pipe: the end of this process.
        environment: variables that must be set before a device is used, such as the visible ones.
        spec: describes the worker.
    """
    # Ctrl-C goes to all processes of a terminal. The pool decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    _Answering(pipe, spec).run()


class _Answering:
    def __init__(self, pipe: Connection, spec: "Spec[Any]") -> None:
        self._pipe = pipe
        self._spec = spec
        self._worker: Computes[Any] | None = None
        self._sending = threading.Lock()

    def run(self) -> None:
        threads = ThreadPoolExecutor(SEGMENTS_IN_FLIGHT, thread_name_prefix=self._spec.unit)
        try:
            while True:
                number, call = self._pipe.recv()
                threads.submit(self._answer, number, call)
        except (EOFError, OSError):  # the pool has ended, or its process has
            if self._worker is not None:
                self._worker.stop()
            threads.shutdown(cancel_futures=True)
            if self._worker is not None:
                self._worker.close()

    def _answer(self, number: int, call: Call) -> None:
        answer: tuple[int, Any, Exception | None]
        try:
            answer = (number, self._result(call), None)
        except Exception as error:  # noqa: BLE001 - the pool decides what it means
            answer = (number, None, error)
        self._send(answer)

    def _result(self, call: Call) -> Any:
        if call == "place":
            return platform.node(), os.getpid()
        if call == "start":
            self._worker = self._spec.start()
            return None
        assert self._worker is not None
        return self._worker.run(call)

    def _send(self, answer: tuple[int, Any, Exception | None]) -> None:
        number, _, error = answer
        if error is not None and not _can_be_sent(error):
            answer = (number, None, RuntimeError(f"{type(error).__name__}: {error}"))
        with self._sending:
            try:
                self._pipe.send(answer)
            except OSError:
                return  # the pool has ended
            except Exception as problem:  # noqa: BLE001 - whatever pickling raises; nothing was sent then
                self._pipe.send((number, None, RuntimeError(f"{type(problem).__name__}: {problem}")))


def _can_be_sent(error: Exception) -> bool:
    """Whether an error can be made again from its arguments, as the receiver will."""
    try:
        return isinstance(copy.copy(error), type(error))
    except Exception:  # noqa: BLE001 - whatever its constructor raises
        return False
