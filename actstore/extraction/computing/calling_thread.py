"""Forwards in the thread that has called us. PyTorch has a pool of threads for each thread that computes: a second pool
beside that of the caller would have more threads than there are cores, and each forward could take twice as long.
"""

import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from actstore.extraction.computing.worker import SEGMENTS_IN_FLIGHT, Worker, WorkerSpec
from actstore.extraction.events import SegmentDone

P = ParamSpec("P")
T = TypeVar("T")


class CallingThread(Executor):
    """Runs calls in the thread that waits in `completed`, in the order in which they were submitted."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[_Call | Future[Any]] = queue.SimpleQueue()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call; see `concurrent.futures.Executor`."""
        call = _Call(lambda: fn(*args, **kwargs))
        self._events.put(call)
        return call.future

    def completed(self, futures: Sequence[Future[T]]) -> Iterator[Future[T]]:
        """Run calls until these futures are done, and give each as soon as it is."""
        for future in futures:
            future.add_done_callback(self._events.put)
        n_left = len(futures)
        while n_left:
            event = self._events.get()
            if isinstance(event, _Call):
                event.run()
            else:
                n_left -= 1
                yield event

    def refuse(self, futures: Sequence[Future[Any]]) -> None:
        """Cancel all calls that are queued, until these futures are done."""
        for future in futures:
            future.add_done_callback(self._events.put)
        while not all(future.done() for future in futures):
            event = self._events.get()
            if isinstance(event, _Call):
                event.future.cancel()


class _Call:
    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act
        self.future: Future[Any] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._act()
        except BaseException as error:
            self.future.set_exception(error)
            if not isinstance(error, Exception):  # Ctrl-C
                raise
        else:
            self.future.set_result(result)


def is_plain_here() -> bool:
    """Whether PyTorch computes in this thread as it does in a new one: no autocast, no other mode or default device."""
    torch = sys.modules.get("torch")
    if torch is None:  # no mode can be on
        return True
    n_modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return (
        n_modes == 0
        and not torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled("cpu")
        and (not torch.is_autocast_enabled("cuda"))
    )


def run(spec: WorkerSpec, pending: Sequence[int], on_done: Callable[[SegmentDone], None]) -> None:
    """Compute and commit segments, as the inline executor does, with all forwards in this thread.

    Args:
        spec: the worker, with a model that is in memory.
        pending: the segments.
        on_done: called once for each.

    Raises:
        ActstoreError: the error of the first segment that failed. What was done before stays.
    """
    forwards = CallingThread()
    worker = Worker(spec, forwards)
    threads = ThreadPoolExecutor(min(SEGMENTS_IN_FLIGHT, len(pending)), thread_name_prefix=spec.unit)
    futures: list[Future[SegmentDone]] = []
    try:
        futures += [threads.submit(worker.run, index) for index in pending]
        for future in forwards.completed(futures):
            on_done(future.result())
    finally:
        # After an error or Ctrl-C: finish what is being written.
        worker.stop()
        threads.shutdown(wait=False, cancel_futures=True)
        forwards.refuse(futures)
        threads.shutdown()
        worker.close()
