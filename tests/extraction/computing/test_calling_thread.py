"""Forwards in the calling thread: their order, errors, and Ctrl-C in the middle of one."""

import signal
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import actstore
from actstore.errors import ExtractError
from actstore.extraction.computing.calling_thread import CallingThread
from tests.conftest import TinyModel

HOOK = "blocks.1.hook_resid_post"


def test_calls_run_here_in_order_and_results_come_as_they_are_done() -> None:
    here, ran = CallingThread(), []

    def work(number: int) -> int:
        def act() -> int:
            ran.append((number, threading.get_ident()))
            return 10 * number

        return here.submit(act).result() + 1

    with ThreadPoolExecutor(1) as threads:
        futures = [threads.submit(work, number) for number in range(5)]
        assert [future.result() for future in here.completed(futures)] == [1, 11, 21, 31, 41]
    assert ran == [(number, threading.get_ident()) for number in range(5)]


def test_calls_that_are_refused_end_those_who_wait_for_them() -> None:
    here = CallingThread()
    with ThreadPoolExecutor(3) as threads:
        futures: list[Future[int]] = [
            threads.submit(lambda: here.submit(lambda: 1).result()) for _ in range(3)
        ]
        here.refuse(futures)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result()


def _press_ctrl_c() -> None:
    # A shell without job control starts commands in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def _fail() -> None:
    raise ValueError("no such luck")


@pytest.mark.parametrize(("trouble", "error"), [(_press_ctrl_c, KeyboardInterrupt), (_fail, ExtractError)])
def test_what_is_committed_stays_and_no_thread_is_left(
    tiny_model: TinyModel, tmp_path: Path, trouble: Callable[[], None], error: type[BaseException]
) -> None:
    """An interrupt or an error in the third of eight forwards; then the same call goes on."""
    model = actstore.HookedModel.from_pretrained(tiny_model("llama"))
    rows = [[number, 5, 6] for number in range(2, 10)]
    n_forwards = 0

    def count(*_: object) -> None:
        nonlocal n_forwards
        n_forwards += 1
        if n_forwards == 4:
            trouble()

    handle = model.hf.model.layers[0].register_forward_hook(count)
    n_threads = threading.active_count()

    def extract() -> actstore.Report:
        sizes: dict[str, Any] = {"batch_size": 1, "segment_size": 1, "context_length": 64}
        return actstore.extract(model=model, tokens=rows, hooks=HOOK, out=tmp_path / "s", **sizes)

    with pytest.raises(error):
        extract()
    assert threading.active_count() == n_threads
    handle.remove()
    report = extract()
    assert 0 < report.n_segments_before < 8
    store = actstore.open(str(tmp_path / "s"))
    assert store.is_complete
    _, cache = model.run_with_cache(torch.tensor(rows))
    torch.testing.assert_close(store[HOOK][:, :3], cache[HOOK], atol=1e-4, rtol=1e-4)
