"""Items made ahead come in order, no more than were asked for, and the thread ends."""

import gc
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from actstore.errors import LoaderError
from actstore.loader.prefetch import Prefetch


def nothing() -> None:
    """The interrupt of items that are made at once, which need none."""


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
    # Four wait, and the thread holds one more, for which there is no room.
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
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
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
    # Not StopIteration, as if there were no more items.
    with pytest.raises(LoaderError, match="the loader was closed"):
        next(ahead)


def test_closed_while_somebody_waits() -> None:
    begun, interrupted = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        begun.set()
        interrupted.wait(60)
        yield 1

    ahead = Prefetch(items(), 2, interrupted.set)
    errors: list[LoaderError] = []

    def wait() -> None:
        try:
            next(ahead)
        except LoaderError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert begun.wait(20)
    ahead.close()
    check_ended(waiting)
    assert len(errors) == 1


def test_who_collects_it_waits_for_nothing() -> None:
    """The thread that collects garbage may be one that the items need."""
    begun, go = threading.Event(), threading.Event()

    def items() -> Iterator[bool]:
        begun.set()
        yield go.wait(60)

    held = [Prefetch(items(), 2, nothing)]
    thread = held[0]._thread
    assert begun.wait(20)

    def collect() -> None:
        held.clear()
        gc.collect()
        go.set()

    collecting = threading.Thread(target=collect)
    collecting.start()
    check_ended(collecting)
    check_ended(thread)


@pytest.mark.parametrize("is_held", [True, False])
def test_a_process_that_ends_waits_for_the_thread(is_held: bool) -> None:
    code = f"""
import time
from actstore.loader.prefetch import Prefetch

def items():
    try:
        for _ in range(50):
            time.sleep(0.01)
            yield 1
    finally:
        print("ended")

ahead = Prefetch(items(), 2, lambda: None)
next(ahead)
if not {is_held}:
    del ahead
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True
    )
    assert done.stdout == "ended\n"


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


def test_a_thread_that_gives_memory_back_is_waited_for_at_the_end() -> None:
    """The loader was dropped without being closed. In torch's code, a thread without an interpreter aborts."""
    code = """
import time
import torch
from actstore.loader.prefetch import Prefetch

class Items:
    memory = torch.zeros(500_000, 8)
    rows = torch.randint(0, 500_000, (500_000,))

    def __iter__(self):
        return self

    def __next__(self):
        return 1

    def __del__(self, select=torch.index_select, now=time.monotonic):
        end = now() + 1
        while now() < end:
            select(self.memory, 0, self.rows)

def use():
    next(Prefetch(iter(Items()), 2, lambda: None))

use()
time.sleep(0.3)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
