"""The inline executor: one worker in this process, its forward and its writing overlapped."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import islice
from typing import Final

from actstore.extraction.computing.executor import Done, Resources, Spec
from actstore.extraction.computing.worker import SEGMENTS_IN_FLIGHT

_GOING: Final = 2 * SEGMENTS_IN_FLIGHT
"""Units that are computed, wait for a thread, or wait to be taken."""


def workers_here(_resources: Resources) -> int:
    """See `actstore.extraction.computing.executor.workers_here`."""
    return 1


def run(
    spec: Spec[Done],
    pending: Sequence[int],
    resources: Resources,
    on_done: Callable[[Done], None],
) -> None:
    """Compute all pending units here; see `Executor`."""
    del resources  # one worker, no cluster
    worker = spec.start()
    threads = ThreadPoolExecutor(SEGMENTS_IN_FLIGHT, thread_name_prefix=spec.unit)
    try:
        # Few at a time, as a result can be large, such as the sums of a scan, and ends with its future.
        waiting = iter(pending)
        going: set[Future[Done]] = set()
        while True:
            going |= {threads.submit(worker.run, index) for index in islice(waiting, _GOING - len(going))}
            if not going:
                break
            ended = next(as_completed(going))
            going.remove(ended)
            on_done(ended.result())
            del ended
    finally:
        # After an error or Ctrl-C: end the forward at its next batch, finish what is being written.
        worker.stop()
        threads.shutdown(cancel_futures=True)
        worker.close()
