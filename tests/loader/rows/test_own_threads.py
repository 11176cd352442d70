"""Parts of a job run in several threads, each of which torch keeps to itself, and are done when the job returns."""

import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from types import FrameType

import pytest
import torch

from actstore.loader.rows import own_threads
from actstore.loader.rows.own_threads import n_threads, run_all

N_THREADS = 3
WAIT_S = 60.0


@pytest.fixture(autouse=True)
def _threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(N_THREADS)
    yield
    torch.set_num_threads(before)


def test_torch_works_in_one_thread_for_each_part() -> None:
    together = threading.Barrier(N_THREADS)
    seen: list[tuple[int, int, int]] = []

    def part(number: int) -> None:
        if number < N_THREADS:
            together.wait(WAIT_S)
        seen.append((number, threading.get_ident(), torch.get_num_threads()))

    run_all(partial(part, number) for number in range(50))
    assert sorted(number for number, _, _ in seen) == list(range(50))
    assert len({thread for _, thread, _ in seen}) == N_THREADS
    assert threading.get_ident() in {thread for _, thread, _ in seen}
    assert {n for _, _, n in seen} == {1}
    assert torch.get_num_threads() == N_THREADS


@pytest.mark.parametrize("n", [1, 2, 100])
def test_as_many_threads_as_torch_has_for_the_caller(n: int) -> None:
    torch.set_num_threads(n)
    assert n_threads() == min(n, 8)


def test_where_torch_cannot_be_kept_to_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_threads, "_limit", lambda: None)
    assert n_threads() == 1
    seen: list[tuple[int, int]] = []
    run_all([lambda: seen.append((threading.get_ident(), torch.get_num_threads()))] * 5)
    assert seen == [(threading.get_ident(), N_THREADS)] * 5


def test_a_symbol_of_another_openmp_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherLibrary:
        @staticmethod
        def omp_set_num_threads(_n: int) -> None:
            pass

    monkeypatch.setattr("ctypes.CDLL", lambda _name: OtherLibrary)
    assert own_threads._limit.__wrapped__() is None


def test_an_error_is_raised_when_no_part_runs_any_more() -> None:
    begun, ended = threading.Event(), threading.Event()
    n_others: list[None] = []

    def failing() -> None:
        assert begun.wait(WAIT_S)
        raise ValueError("this part failed")

    def long() -> None:
        begun.set()
        ended.wait(0.3)  # nobody sets it before
        ended.set()

    with pytest.raises(ValueError, match="this part failed"):
        run_all([failing, long, *[lambda: n_others.append(None)] * 1_000_000])
    assert ended.is_set()
    assert len(n_others) < 1_000_000
    assert torch.get_num_threads() == N_THREADS


def test_an_interruption_waits_for_parts_that_run() -> None:
    """The caller's memory may be gone afterwards."""
    begun, ended = threading.Event(), threading.Event()

    def part() -> None:
        if threading.current_thread() is threading.main_thread():
            assert begun.wait(WAIT_S)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        elif not begun.is_set():
            begun.set()
            ended.wait(0.5)  # nobody sets it before
            ended.set()

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all([part, part])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended.is_set()


def test_no_part_is_held_afterwards() -> None:
    """What a part holds is memory of a batch, which is reused once nobody holds it."""

    class Held:
        def part(self) -> None:
            torch.ones(1)

    parts = [Held() for _ in range(20)]
    refs = [weakref.ref(one) for one in parts]
    run_all([one.part for one in parts])
    del parts
    assert [ref() for ref in refs] == [None] * 20


def test_many_callers_at_once() -> None:
    n_calls, done = 8, list[int]()

    def call(caller: int) -> None:
        for _ in range(50):
            run_all([partial(done.append, caller)] * 5)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(n_calls)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT_S)
    assert sorted(done) == [caller for caller in range(n_calls) for _ in range(250)]


def test_a_forked_process_has_threads_of_its_own() -> None:
    code = f"""
import os, signal, threading
import torch
from actstore.loader.rows.own_threads import run_all

def in_two_threads():
    together = threading.Barrier(2)
    run_all([lambda: together.wait({WAIT_S})] * 2)

torch.set_num_threads(2)
in_two_threads()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    in_two_threads()
    os._exit(0)
print(os.waitpid(pid, 0)[1])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    ended = subprocess.run(
        [sys.executable, "-c", code], timeout=180, capture_output=True, text=True, env=environment
    )
    assert ended.stdout == "0\n", ended.stderr


def test_a_process_that_is_exiting_works_alone() -> None:
    code = """
import atexit
import torch
from actstore.loader.rows.own_threads import run_all

torch.set_num_threads(2)
atexit.register(lambda: run_all([lambda: print("ran")] * 3))
run_all([lambda: None] * 3)
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=180, capture_output=True, text=True)
    assert ended.stdout == "ran\nran\nran\n", ended.stderr
