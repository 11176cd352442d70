"""The memory budget of a process: shares, which account is given up, and no leaks."""

import gc
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

import actstore
from actstore.facade import Store
from actstore.loader.options import LoaderOptions, options_of
from actstore.query.problem import Problem
from actstore.query.server.memory.budget import Account, MemoryBudget
from actstore.query.server.memory.deferring import DeferringLock
from actstore.query.server.monitoring.metrics import Metrics
from actstore.query.server.sharing.order_memory import ORDER_NBYTES, checked_footprint
from actstore.query.server.sharing.shared_batches import SharedBatches
from actstore.storage.local import LocalBlobs
from tests.query.server.sharing.test_sharing import HOOK, write

A, B = "a", "b"
TOTAL: Final = 1000


@pytest.fixture
def budget() -> MemoryBudget:
    return MemoryBudget(TOTAL)


def spare(budget: MemoryBudget, client: str, nbytes: int, given_up: list[str], name: str) -> Account:
    """An account that can be given up, and records it."""

    def give_up() -> None:
        given_up.append(name)
        account.close()

    account = budget.account(client, give_up)
    account.grow(nbytes, nbytes)
    account.leave()
    return account


def refused(call: Callable[[], object]) -> Problem:
    with pytest.raises(Problem) as raised:
        call()
    return raised.value


def test_a_client_has_half_at_most(budget: MemoryBudget) -> None:
    first = budget.hold(A, 400)
    problem = refused(lambda: budget.hold(A, 101))
    assert (problem.status, problem.kind) == (503, "busy")
    assert 1 <= int(problem.headers["Retry-After"]) <= 30
    assert "400 bytes" in str(problem)
    others = [budget.hold(B, 500), budget.hold(A, 100)]
    assert "other clients" in str(refused(lambda: budget.hold("c", 1)))
    assert budget.held == TOTAL
    for account in (first, *others, first):  # closing twice is allowed
        account.close()
    assert budget.held == 0
    assert budget.hold(A, 500).nbytes == 500


def test_what_never_fits_is_told_apart(budget: MemoryBudget) -> None:
    budget.check(500, "it takes", "ask for less")
    problem = refused(lambda: budget.check(501, "it takes", "ask for less"))
    assert problem.status == 413
    assert (
        str(problem)
        == "it takes 501 bytes of memory, and a client may have 500 of the server's; ask for less"
    )


def test_own_memory_is_given_up_first_then_what_was_not_used_for_longest(budget: MemoryBudget) -> None:
    given_up: list[str] = []
    old = spare(budget, B, 200, given_up, "b old")
    spare(budget, A, 300, given_up, "a")
    spare(budget, B, 300, given_up, "b new")
    assert old.use(B)
    old.leave()
    budget.hold(A, 300)
    assert given_up == ["a"]
    budget.hold(A, 200)
    assert given_up == ["a"]
    budget.hold(B, 200)
    assert given_up == ["a", "b new"]
    assert not budget.account(A).has_grown(200)  # nothing is given up for that
    assert given_up == ["a", "b new"]


def test_what_is_used_is_not_given_up(budget: MemoryBudget) -> None:
    given_up: list[str] = []
    account = spare(budget, A, 300, given_up, "a")
    assert account.use(B)  # and now it counts for this client
    budget.hold(A, 500)
    assert refused(lambda: budget.hold(B, 201)).status == 503
    assert refused(lambda: budget.hold("c", 201)).status == 503
    assert not given_up
    account.leave()
    budget.hold("c", 201)
    assert given_up == ["a"]
    assert not account.use(A)


def test_a_finalizer_may_come_at_any_moment() -> None:
    """It may also run in the thread that holds the lock."""
    lock, called = DeferringLock(), []
    with lock:
        lock.later(lambda: called.append(1))
        assert not called
    assert called == [1]
    lock.later(lambda: called.append(2))
    assert called == [1, 2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    write(LocalBlobs(tmp_path / "store"), 0, n_shards=2)
    return actstore.open(tmp_path / "store")


def options_for(store: Store, seed: int) -> LoaderOptions:
    return options_of(store, HOOK, batch_size=1000, seed=seed, epochs=None)


def test_a_batch_that_is_being_sent_outlives_its_order(store: Store) -> None:
    budget = MemoryBudget(1 << 28)
    nbytes = checked_footprint(budget, store, options_for(store, 0)).batch
    shared = SharedBatches(Metrics(), budget)
    order = shared.order(store, options_for(store, 0), A).order
    leases = [order.batch(0, 0, client) for client in (A, B, B)]
    array = leases[0].made.result(60).numpy()  # type: ignore[union-attr]
    expected = array.tobytes()
    leases[0].hold_for(array)
    shared.close()
    assert budget.held == nbytes
    del leases[1:]
    assert budget.held == nbytes
    leases.clear()
    assert budget.held == nbytes
    assert array.tobytes() == expected
    del array, order
    gc.collect()
    assert budget.held == 0


def test_nothing_is_lost_under_load(store: Store) -> None:
    """Threads of three clients request batches of more orders than there is room for, and keep some of them."""
    budget = MemoryBudget(6 * ORDER_NBYTES + (64 << 20))
    shared = SharedBatches(Metrics(), budget)
    expected = {seed: [first(store, seed, k) for k in range(3)] for seed in range(8)}
    n_given, most, counting = 0, 0, threading.Lock()

    def ask(number: int) -> None:
        nonlocal n_given, most
        draw, kept = random.Random(number), []
        for _ in range(60):
            seed, k = draw.randrange(8), draw.randrange(3)
            try:
                used = shared.order(store, options_for(store, seed), f"client {number % 3}")
                lease = used.order.batch(0, k, f"client {number % 3}")
                values = lease.made.result(60)
                used.end()
            except Problem as problem:
                assert problem.status == 503  # noqa: PT017 - it is one of two right answers
                continue
            assert values.numpy()[0].tobytes() == expected[seed][k]  # type: ignore[union-attr]
            with counting:
                n_given, most = n_given + 1, max(most, budget.held)
            if draw.random() < 0.3:
                kept.append((lease, values, expected[seed][k]))
            if draw.random() < 0.2:
                kept.clear()
        assert all(values.numpy()[0].tobytes() == right for _, values, right in kept)  # type: ignore[union-attr]

    with ThreadPoolExecutor(6) as threads:
        for done in [threads.submit(ask, number) for number in range(6)]:
            done.result(120)
    assert n_given > 100
    assert 0 < most <= budget.limit
    shared.close()
    gc.collect()
    assert budget.held == 0
    assert not budget._claimed


def first(store: Store, seed: int, k: int) -> bytes:
    with store.loader(HOOK, batch_size=1000, seed=seed) as loader:
        row_bytes: bytes = loader.batch(k)[0].numpy().tobytes()
        return row_bytes
