"""Items made ahead: in order, no more of them than asked for, and an end for the thread."""

import gc
import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from actstore.loader.prefetch import Prefetch


def nothing() -> None:
    """Items that are made at once need not be interrupted."""


def check_ended(thread: threading.Thread) -> None:
    thread.join(20)
    assert not thread.is_alive()


def test_order_and_end() -> None:
    ahead = Prefetch(iter(range(100)), 3, nothing)
    assert list(ahead) == list(range(100))
    check_ended(ahead._thread)


def test_no_more_than_asked_for() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    ahead = Prefetch(items(), 4, nothing)
    assert next(ahead) == 0
    deadline = time.monotonic() + 20
    while ahead.n_ready < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    # Four wait, and one more is held by the thread, for which there is no place.
    assert ahead.n_ready == 4
    assert len(made) <= 6
    ahead.close()
    check_ended(ahead._thread)


def test_errors_come_where_their_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    ahead = Prefetch(items(), 5, nothing)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)
    check_ended(ahead._thread)


def test_the_thread_goes_with_the_object() -> None:
    ahead = Prefetch(itertools.count(), 2, nothing)
    assert next(ahead) == 0
    thread = ahead._thread
    del ahead
    gc.collect()
    check_ended(thread)


def test_what_is_closed_has_ended() -> None:
    ahead = Prefetch(itertools.count(), 2, nothing)
    ahead.close()
    ahead.close()
    with pytest.raises(StopIteration):
        next(ahead)


def test_an_item_that_takes_long_is_interrupted() -> None:
    begun, interrupted = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        begun.set()
        yield int(interrupted.wait(60))

    ahead = Prefetch(items(), 2, interrupted.set)
    assert begun.wait(20)
    ahead.close()
    assert interrupted.is_set()
    check_ended(ahead._thread)
