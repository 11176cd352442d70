"""The inline executor: one worker in this process, its forward and its writing overlapped."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from actstore.extraction.computing.executor import Done, Resources, Spec
from actstore.extraction.computing.worker import SEGMENTS_IN_FLIGHT


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
        futures = [threads.submit(worker.run, index) for index in pending]
        for future in as_completed(futures):
            on_done(future.result())
    finally:
        # After an error or Ctrl-C: end the forward at its next batch, finish what is being written.
        worker.stop()
        threads.shutdown(cancel_futures=True)
        worker.close()
