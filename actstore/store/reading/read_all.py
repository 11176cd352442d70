"""Reading many pieces in threads."""

import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

P = TypeVar("P")


def read_all(read: Callable[[P], None], pieces: Iterable[P], n_threads: int) -> None:
    """Read all pieces; the first error ends it.

    Threads are made for each call, since a forked process would wait for idle ones that it does not have.
    """
    todo = iter(pieces)
    begun = list(itertools.islice(todo, n_threads))
    todo = itertools.chain(begun, todo)
    if len(begun) <= 1:
        for piece in todo:
            read(piece)
        return
    lock = threading.Lock()
    failed = threading.Event()

    def work() -> None:
        while not failed.is_set():
            with lock:
                piece = next(todo, None)
            if piece is None:
                return
            try:
                read(piece)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(len(begun), thread_name_prefix="rows") as threads:
        for done in [threads.submit(work) for _ in begun]:
            done.result()
