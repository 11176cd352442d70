"""Trainers that share a server: what one of them reads from storage is not read again for the others."""

import random
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

import actstore
from actstore.errors import LoaderError, StorageError
from actstore.facade import Store
from actstore.loader.arguments import Shuffle
from actstore.loader.batches.batch import Batch, Values
from actstore.loader.options import LoaderOptions, options_of
from actstore.query.problem import Problem
from actstore.query.server.memory.budget import MemoryBudget
from actstore.query.server.monitoring.metrics import Metrics
from actstore.query.server.sharing.order_memory import ORDER_NBYTES, checked_footprint, n_kept_of
from actstore.query.server.sharing.shared_batches import Order, SharedBatches
from actstore.query.server.sharing.slots import Lent
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.records.seal import seal
from tests.conftest import S3Server
from tests.query.running import Running, running
from tests.query.tcp_proxy import TcpProxy, tcp_proxy
from tests.query.test_conformance import bits
from tests.store.example import LENGTH, example_plan, example_values, write_store
from tests.store.runs import with_hooks

HOOK: Final = "blocks.0.hook_resid_post"
SHARD_ROWS: Final = 512 * LENGTH
N_SHARDS: Final = 12
"""Shards of 256 KiB each."""
OPTIONS: Final[dict[str, Any]] = {
    "batch_size": 1024,
    "shuffle": "window",
    "window_rows": 2 * SHARD_ROWS,  # 6 windows of 8 batches
    "seed": 3,
}
CLIENT: Final = "somebody"
MOST: Final = 1.2
"""Share of the bytes of one trainer that all trainers together may read from storage."""
NAMES: Final = ("alone", "pair", "ranks")
"""Stores with different values, so that the cache of one has nothing of another."""


def write(blobs: Blobs, seed: int, n_shards: int = N_SHARDS) -> None:
    n_sequences = n_shards * SHARD_ROWS // LENGTH - 100
    plan = example_plan(
        segment_size=SHARD_ROWS // LENGTH, n_sequences=n_sequences, n_tokens=n_sequences * LENGTH
    )
    plan = with_hooks(plan, HOOK)
    values = {HOOK: np.roll(example_values(plan)[HOOK], seed, axis=0)}
    write_store(blobs, plan, values, range(plan.n_segments))
    seal(blobs)


@dataclass(frozen=True)
class Served:
    """A server, and a proxy between it and its storage."""

    server: Running
    proxy: TcpProxy
    local: Path
    """Folder of the same stores."""
    nbytes_alone: int
    """Bytes that a whole epoch of one trainer reads from storage."""

    def stores(self, name: str, n: int) -> list[Store]:
        return [self.server.store(name, direct=False) for _ in range(n)]

    def expected(self, name: str, **options: Any) -> list[Any]:
        with actstore.open(self.local / name).loader(HOOK, **OPTIONS | options) as loader:
            return [bits(batch) for batch in loader]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    for seed, name in enumerate(NAMES):
        write(LocalBlobs(folder / name), seed)
    return folder


@pytest.fixture(scope="module")
def remote(s3_server: S3Server) -> str:
    """The same stores on S3."""
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"
    for seed, name in enumerate(NAMES):
        write(open_blobs(f"{url}/{name}"), seed)
    return url


@pytest.fixture(
    scope="module",
    params=[(1, None), (1, 2 << 20), (2, None)],
    ids=["one process", "small cache", "two processes"],
)
def served(
    request: pytest.FixtureRequest,
    s3_server: S3Server,
    remote: str,
    local: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """Servers of one process, of one whose cache holds two thirds of a store, and of two."""
    n_workers, cache_limit = request.param
    arguments = ["--root", remote, "--workers", str(n_workers)]
    if cache_limit is not None:
        arguments += ["--cache-limit", str(cache_limit)]
    with (
        tcp_proxy(s3_server.endpoint) as proxy,
        running(tmp_path_factory.mktemp("log"), *arguments, AWS_ENDPOINT_URL=proxy.url) as server,
    ):
        before = proxy.nbytes
        with server.store("alone", direct=False).loader(HOOK, **OPTIONS) as loader:
            assert sum(1 for _ in loader) == loader.n_batches
        yield Served(server, proxy, local, proxy.nbytes - before)


def test_one_trainer_reads_all_once(served: Served) -> None:
    """It is the measure for the others."""
    store = actstore.open(served.local / "alone")
    # A loader begins with the checksums and the statistics of the store, which are large compared with so few rows.
    finished = [run.finished for run in store.runs if run.finished is not None]
    records = sum(record.nbytes for entry in finished for record in (entry.shards, entry.statistics))
    nbytes = store[HOOK].nbytes
    assert nbytes < served.nbytes_alone - records < MOST * nbytes


def lags(n_batches: int, most: int) -> Iterator[tuple[int, int]]:
    """Trainer and batch of each step: a walk in which the second trainer is up to ``most`` batches behind, or ahead."""
    draw = random.Random(5)
    taken = [0, 0]
    while taken != [n_batches, n_batches]:
        lead = taken[0] - taken[1]
        who = 1 if taken[0] == n_batches or lead >= most else draw.choice([0, 0, 1])
        if taken[1] == n_batches or lead <= -2:
            who = 0
        yield who, taken[who]
        taken[who] += 1


def test_two_trainers_at_their_own_pace(served: Served) -> None:
    """One is up to 6 batches behind the other, which is often in another window."""
    expected = served.expected("pair")
    before = served.proxy.nbytes
    first, second = served.stores("pair", 2)
    with first.loader(HOOK, **OPTIONS) as one, second.loader(HOOK, **OPTIONS) as two:
        for who, k in lags(one.n_batches, 6):
            assert bits(next((one, two)[who])) == expected[k], (who, k)
    assert served.proxy.nbytes - before <= MOST * served.nbytes_alone


def test_two_ranks_at_once(served: Served) -> None:
    """Each runs in a thread; they wait for each other after each batch, as ranks do for their gradients."""
    ranks: list[dict[str, Any]] = [{"rank": rank, "world_size": 2} for rank in (0, 1)]
    expected = [served.expected("ranks", **rank) for rank in ranks]
    before = served.proxy.nbytes

    step = threading.Barrier(2)

    def train(rank: int, store: Store) -> list[Any]:
        batches = []
        with store.loader(HOOK, **OPTIONS, **ranks[rank]) as loader:
            for batch in loader:
                batches.append(bits(batch))
                step.wait(60)
        return batches

    with ThreadPoolExecutor(2) as threads:
        trained = list(threads.map(train, (0, 1), served.stores("ranks", 2)))
    assert trained == expected
    assert served.proxy.nbytes - before <= MOST * served.nbytes_alone


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of two shards."""
    write(LocalBlobs(tmp_path / "store"), 0, n_shards=2)
    return actstore.open(tmp_path / "store")


def options_for(store: Store, seed: int = 0, shuffle: Shuffle | None = "window") -> LoaderOptions:
    return options_of(
        store, HOOK, batch_size=1000, seed=seed, shuffle=shuffle, window_rows=SHARD_ROWS, epochs=None
    )


@pytest.fixture
def shared() -> Iterator[SharedBatches]:
    orders = SharedBatches(Metrics(), MemoryBudget(1 << 30))
    yield orders
    orders.close()


def counted(name: str) -> float:
    """Value of a counter of this process."""
    line = next(
        line for line in Metrics().text().decode().splitlines() if line.startswith(f"actstore_{name}_total ")
    )
    return float(line.split()[1])


def at_once(n: int, call: Callable[[], Any]) -> list[Any]:
    """Results of the same call in ``n`` threads, with errors among them."""
    barrier = threading.Barrier(n)

    def run() -> Any:
        barrier.wait()
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - it is returned
            return error

    with ThreadPoolExecutor(n) as threads:
        return [future.result() for future in [threads.submit(run) for _ in range(n)]]


def given(order: Order, k: int, rank: int = 0, world_size: int = 1) -> Values | Batch:
    """A batch of the first epoch, once it is made."""
    made = order.part(order.batch(0, k, CLIENT).made.result(60), k, rank, world_size)
    assert not isinstance(made, Lent)
    return made


def order_of(shared: SharedBatches, store: Store, options: LoaderOptions) -> Order:
    """An order whose memory others may have."""
    return shared.order(store, options, CLIENT).order


def test_a_batch_is_made_once(shared: SharedBatches, store: Store) -> None:
    made, n_shared = counted("batches_made"), counted("batches_shared")
    options = options_for(store)
    made_batches = at_once(8, lambda: given(order_of(shared, store, options), 3))
    assert all(made_batch is made_batches[0] for made_batch in made_batches)
    assert (counted("batches_made") - made, counted("batches_shared") - n_shared) == (1, 7)
    with store.loader(HOOK, batch_size=1000, shuffle="window", window_rows=SHARD_ROWS) as loader:
        assert bits(made_batches[0]) == bits(loader.batch(3))


def test_the_next_batch_is_made_ahead(shared: SharedBatches, store: Store) -> None:
    order = order_of(shared, store, options_for(store))
    given(order, 0)
    given(order, 1)
    n_shared = counted("batches_shared")
    given(order, 2)
    assert counted("batches_shared") == n_shared + 1
    given(order, order.maker.batches.n_batches - 1)  # there is none after it
    with pytest.raises(IndexError, match="batches"):
        given(order, order.maker.batches.n_batches)


def test_ranks_get_their_parts_of_one_batch(shared: SharedBatches, store: Store) -> None:
    order = order_of(shared, store, options_for(store))
    last = order.maker.batches.n_batches - 1
    made = counted("batches_made")
    for k in (0, last):
        whole = given(order, k)
        parts = [given(order, k, rank, 3) for rank in range(3)]
        assert isinstance(whole, torch.Tensor)
        assert bits(np.concatenate(parts)) == bits(whole)  # type: ignore[arg-type]
        for rank, part in enumerate(parts):
            with store.loader(
                HOOK, batch_size=1000, shuffle="window", window_rows=SHARD_ROWS, rank=rank, world_size=3
            ) as loader:
                assert bits(part) == bits(loader.batch(k))
    assert counted("batches_made") == made + 2


@pytest.mark.parametrize("shuffle", ["window", "global", None])
def test_a_batch_that_failed_is_made_again(
    shared: SharedBatches, store: Store, shuffle: Shuffle | None
) -> None:
    order = order_of(shared, store, options_for(store, shuffle=shuffle))
    folder = Path(store.url) / "acts"
    folder.rename(folder.with_name("gone"))
    assert all(isinstance(error, StorageError) for error in at_once(4, lambda: given(order, 1)))
    folder.with_name("gone").rename(folder)
    with store.loader(HOOK, batch_size=1000, shuffle=shuffle, window_rows=SHARD_ROWS) as loader:
        assert bits(given(order, 1)) == bits(loader.batch(1))


def test_an_order_that_cannot_be_is_tried_again(shared: SharedBatches, store: Store) -> None:
    options = options_of(store, HOOK, batch_size=8, shuffle=None, max_norm=-0.0)
    assert all(
        isinstance(error, LoaderError) for error in at_once(4, lambda: order_of(shared, store, options))
    )
    with pytest.raises(LoaderError):
        order_of(shared, store, options)


def test_an_order_that_is_given_up_says_so(store: Store) -> None:
    shared = SharedBatches(Metrics(), MemoryBudget(4 * ORDER_NBYTES + (48 << 20)))
    first = order_of(shared, store, options_for(store))
    kept = given(first, 0)
    others = [order_of(shared, store, options_for(store, seed)) for seed in range(1, 8)]
    with pytest.raises(Problem, match="ask again") as raised:
        given(first, 5)
    assert (raised.value.status, raised.value.kind) == (503, "busy")
    assert raised.value.headers["Retry-After"] == "1"
    assert bits(given(others[-1], 0)) != bits(kept)
    again = order_of(shared, store, options_for(store))
    assert again is not first
    assert bits(given(again, 0)) == bits(kept)
    shared.close()


def test_an_order_is_given_up_while_it_is_asked(shared: SharedBatches, store: Store) -> None:
    """Each of many threads gets the right batch, or an error that asks it to try again."""
    order = order_of(shared, store, options_for(store))
    expected = [bits(order.maker(0, k)) for k in range(order.maker.batches.n_batches)]
    numbers = iter(range(len(expected)))

    def ask() -> tuple[int, Any]:
        k = next(numbers)
        return k, given(order, k)

    def ask_or_close() -> Any:
        return shared.close() if threading.current_thread().name.endswith("_0") else ask()

    n_given = 0
    for result in at_once(len(expected), ask_or_close):
        if isinstance(result, tuple):
            n_given += 1
            assert bits(result[1]) == expected[result[0]]
        elif result is not None:
            assert isinstance(result, CancelledError | LoaderError | Problem), result
    assert n_given < len(expected)


def test_few_batches_are_kept(store: Store) -> None:
    """Memory is limited in bytes; at least two are kept, or none could be made ahead."""
    nbytes = 1000 * store[HOOK].shape[2] * 4
    for limit, n_kept in ((1 << 26, 16), (16 * 5 * nbytes, 5), (16 * nbytes, 2)):
        budget = MemoryBudget(1 << 26)
        account = budget.account(CLIENT)
        options = options_for(store)
        needed = checked_footprint(budget, store, options)
        account.grow(needed.batch)
        n_most = n_kept_of(limit, needed)
        order = Order(store, options, Metrics(), budget, account, needed, n_most, None, lambda: None)
        made = counted("batches_made")
        for k in range(8):
            given(order, k)
        kept = min(8, n_kept - 1)  # beside the one that is made ahead
        for k in reversed(range(8 - kept, 8)):
            given(order, k)
        assert counted("batches_made") == made + 2  # the others were made ahead, or kept
        assert account.nbytes <= n_kept * nbytes
        order.close()
        assert budget.held == 0
