"""One store, reached in six ways, gives the same answers bit for bit as its files."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

import actstore
from actstore.analysis.search import sequence_sha256
from actstore.errors import ActstoreError, HookError, JobError, LoaderError, NotCommittedError, TokensError
from actstore.facade import Store
from actstore.loader.batches.batch import Batch
from actstore.query.client.served_batches import ServedBatches
from actstore.query.client.served_rows import ServedRows
from actstore.store.reading.rows import Rows
from tests.query.running import Running
from tests.query.stores import COMPRESSED, GROWN, KEPT, NAMES, SLOTS, TEXT, WHOLE
from tests.store.example import HOOKS, LENGTH, N, example_plan, example_values
from tests.store.kept import KEEP

pytestmark = pytest.mark.s3

RESID, _, Z = HOOKS
WAYS: Final = ("s3", "served", "served-s3", "direct", "signed")
"""With `direct` and `signed`, the client asks a server where the bytes are, and reads them without it."""

Open = Callable[[str], Store]


@pytest.fixture(scope="module", params=WAYS)
def opened(request: pytest.FixtureRequest) -> Open:
    """A function that opens a store by its name, in one of the ways; each of them once."""
    way = request.param

    @functools.cache
    def by_name(name: str) -> Store:
        if way == "s3":
            return actstore.open(f"{request.getfixturevalue('s3_stores')}/{name}")
        running: Running = request.getfixturevalue("server" if way in ("served", "direct") else "s3_served")
        return running.store(name, direct=not way.startswith("served"))

    return by_name


@pytest.fixture(scope="module")
def local(stores: Path) -> Open:
    return functools.cache(lambda name: actstore.open(stores / name))


def bits(values: Any) -> Any:
    """Bits of a tensor or an array, so that NaN compares equal."""
    shape = tuple(values.shape)
    if isinstance(values, torch.Tensor):
        values = values.reshape(-1).view(torch.uint8).numpy() if values.numel() else np.empty(0)
    return np.ascontiguousarray(values).tobytes(), shape


def outcome(array: Any, index: Any) -> Any:
    """Result of an index, to be compared: bits, or the kind of error."""
    try:
        return bits(array[index])
    except (IndexError, ActstoreError) as error:
        return type(error)


def test_the_ways_are_what_they_say(opened: Open, request: pytest.FixtureRequest) -> None:
    store = opened(WHOLE)
    rows = store[RESID].rows
    way = request.node.callspec.params["opened"]
    assert isinstance(rows, ServedRows) == way.startswith("served")
    kind = type(rows.blobs).__name__
    assert {"direct": "LocalBlobs", "signed": "SignedBlobs"}.get(way, kind) == kind
    loader = store.loader(RESID, batch_size=8, shuffle="window")
    assert isinstance(loader._make, ServedBatches) == way.startswith("served")


@pytest.mark.parametrize("name", NAMES)
def test_what_there_is(name: str, opened: Open, local: Open) -> None:
    ours, theirs = local(name), opened(name)
    for field in (
        "hooks",
        "shape",
        "metadata",
        "n_tokens",
        "nbytes",
        "n_segments",
        "n_committed",
        "is_complete",
    ):
        assert getattr(theirs, field) == getattr(ours, field), field
    assert theirs.n_sequences_committed == ours.n_sequences_committed
    assert bits(theirs.committed_rows()) == bits(ours.committed_rows())
    assert [run.plan for run in theirs.runs] == [run.plan for run in ours.runs]
    assert ("resid_post", 0) in theirs
    assert "blocks.7.hook_resid_post" not in theirs
    assert theirs.matching("blocks.*.hook_resid_post") == ours.matching("blocks.*.hook_resid_post")
    theirs.refresh()
    assert theirs.hooks == ours.hooks


def test_kept_columns(opened: Open, local: Open) -> None:
    ours, theirs = local(KEPT), opened(KEPT)
    assert theirs.columns == ours.columns == KEEP
    assert theirs.column("label") == ours.column("label")
    assert theirs.rows == ours.rows
    assert theirs.rows.num_rows == 140
    assert theirs.document_rows([3, 1]).tolist() == ours.document_rows([3, 1]).tolist()
    with pytest.raises(TokensError, match="keeps no columns"):
        _ = opened(WHOLE).rows


def test_rows_at_positions(opened: Open, local: Open) -> None:
    whole, some = opened(WHOLE), opened(SLOTS)
    rng = np.random.default_rng(0)
    sequences, positions = rng.integers(0, N, 40), rng.integers(0, LENGTH, 40)
    expected = example_values(example_plan("bfloat16"))[RESID][sequences, positions]
    assert bits(whole[RESID].at(sequences, positions)) == bits(expected)
    assert bits(whole[RESID].last()) == bits(local(WHOLE)[RESID].last())
    chosen = [(i, p) for i, row in enumerate(TEXT.chosen) for p in row]
    sequences, positions = map(np.array, zip(*chosen, strict=True))
    assert bits(some[RESID].at(sequences, positions)) == bits(TEXT.values[RESID][sequences, positions])
    assert some.positions is not None
    assert bits(some.positions[:]) == bits(TEXT.positions)
    assert some.counts[:].tolist() == [len(row) for row in TEXT.chosen]
    assert whole.positions is None
    with pytest.raises(IndexError, match="is not stored: the store has its positions"):
        some[RESID].at([next(i for i, row in enumerate(TEXT.chosen) if 0 not in row)], [0])
    found = some.locate(tokens=TEXT.tokens[3, :1])
    assert bits(found.positions) == bits(local(SLOTS).locate(tokens=TEXT.tokens[3, :1]).positions)


def test_batches_of_chosen_positions(opened: Open, local: Open) -> None:
    for options in ({}, {"seqpos": slice(1, 5)}, {"drop": [2, 3]}):
        ours, theirs = (
            from_(SLOTS).loader(
                RESID, batch_size=8, shuffle="window", window_rows=32, epochs=1, provenance=True, **options
            )
            for from_ in (local, opened)
        )
        for k, (expected, given) in enumerate(zip(ours, theirs, strict=True)):
            assert isinstance(expected, Batch)
            assert isinstance(given, Batch)
            for field in ("values", "sequences", "positions", "tokens"):
                assert bits(getattr(given, field)) == bits(getattr(expected, field)), field
            assert [bits(rows) for rows in theirs.rows(k)] == [bits(rows) for rows in ours.rows(k)]
            places = expected.sequences.numpy(), expected.positions.numpy()
            assert bits(expected.values) == bits(TEXT.values[RESID][places])


INDICES: Final[tuple[Any, ...]] = (
    0,
    -1,
    N - 1,
    N,
    -N - 1,
    np.int64(3),
    slice(None),
    slice(5, 21),
    slice(30, 3, -4),
    slice(1, None, 7),
    slice(9, 9),
    [3, 17, 3, 0],
    [N + 40],
    np.arange(N) % 3 == 0,
    ...,
    (slice(2, 30), -1),
    (slice(2, 30), slice(2, 5)),
    (slice(2, 30), slice(None, None, -1)),
    (slice(2, 30), [5, 1]),
    ([3, 17], slice(1, 3)),
    (4, 2),
    (slice(0, 9), ..., slice(1, None, 2)),
    (slice(0, 9), 3, -1),
    (slice(0, 9), slice(None), slice(None, None, -1)),
    (0, LENGTH),
    (slice(0, 2), slice(0, 2), 0, 0, 0),
    "seven",
    1.5,
)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices(index: Any, opened: Open, local: Open) -> None:
    for name in NAMES:
        ours, theirs = local(name), opened(name)
        for hook in ours.hooks:
            assert outcome(theirs[hook], index) == outcome(ours[hook], index), (name, hook)


def test_slices_are_what_was_written(opened: Open) -> None:
    plan = example_plan("bfloat16")
    for hook, values in example_values(plan).items():
        rows = opened(WHOLE)[hook][3:36]
        assert rows.dtype == torch.bfloat16
        assert bits(rows) == bits(values[3:36])


@pytest.mark.parametrize("name", ["tokens", "lengths", "documents", "offsets"])
def test_tokens(name: str, opened: Open, local: Open) -> None:
    ours: Rows = getattr(local(GROWN), name)
    theirs: Rows = getattr(opened(GROWN), name)
    for index in (slice(None), 5, [60, 2], slice(20, 50)):
        assert outcome(theirs, index) == outcome(ours, index), index
    out = np.empty((4, *ours.shape[1:]), ours.storage)
    assert theirs.read(slice(2, 6), out) is out
    assert bits(out) == bits(ours[2:6])


@pytest.mark.parametrize("index", [slice(None), 3, (slice(20, 30), 2), [36, 0, 17]])
def test_norms(index: Any, opened: Open, local: Open) -> None:
    for hook in HOOKS:
        ours, theirs = local(WHOLE)[hook].norms, opened(WHOLE)[hook].norms
        assert ours.ranges == theirs.ranges == (range(N),)
        assert outcome(theirs, index) == outcome(ours, index)
    assert opened(COMPRESSED)[RESID].norms.ranges == ()
    array: Any = opened(WHOLE).zarr["norms/0000"]
    np.testing.assert_array_equal(array[:, 1], local(WHOLE)[HOOKS[1]].norms[:])


def test_rows_that_are_not_committed_raise(opened: Open) -> None:
    store = opened(GROWN)
    with pytest.raises(NotCommittedError, match="not committed"):
        store[RESID][N]
    with pytest.raises(NotCommittedError, match="not committed"):
        store["blocks.0.hook_mlp_out"][20]
    with pytest.raises(HookError, match="it holds"):
        store["blocks.1.hook_mlp_out"]


@pytest.mark.parametrize("name", NAMES)
def test_statistics(name: str, opened: Open, local: Open) -> None:
    ours, theirs = local(name), opened(name)
    for hook in ours.hooks:
        assert theirs.stats(hook).record == ours.stats(hook).record
        assert theirs.stats(hook).shape == ours.stats(hook).shape


@pytest.mark.parametrize("sequences", [3, [3, 17], slice(2, 9), []], ids=str)
def test_caches(sequences: Any, opened: Open, local: Open) -> None:
    for names in (None, "blocks.*.hook_resid_post", [("z", 1)]):
        ours = local(WHOLE).cache(sequences, names_filter=names)
        theirs = opened(WHOLE).cache(sequences, names_filter=names)
        assert list(theirs.keys()) == list(ours.keys())
        assert all(bits(theirs[key]) == bits(value) for key, value in ours.items())
    with pytest.raises(IndexError, match="out of bounds"):
        opened(WHOLE).cache([0, N])
    with pytest.raises(HookError):
        opened(WHOLE).cache([0], names_filter="blocks.*.hook_mlp_out")


def test_searches(opened: Open, local: Open) -> None:
    ours, theirs = local(GROWN), opened(GROWN)
    for tokens in ([9, 10, 11], [3], np.array([8, 9]), [77_777]):
        assert [*map(bits, theirs.locate(tokens=tokens))] == [*map(bits, ours.locate(tokens=tokens))]
        assert bits(theirs.find(tokens=tokens, limit=1)) == bits(ours.find(tokens=tokens, limit=1))
    assert theirs.find(tokens=[8, 9], prefix=True).tolist() == ours.find(tokens=[8, 9], prefix=True).tolist()
    assert theirs.find(sha=sequence_sha256(ours.tokens[5])).tolist() == [5, N + 5]
    wrong: tuple[dict[str, Any], ...] = (
        {},
        {"tokens": []},
        {"tokens": [1], "limit": 0},
        {"sha": "x"},
        {"tokens": [1], "sha": "x"},
    )
    for asked in wrong:
        with pytest.raises(JobError):
            theirs.find(**asked)


ORDERS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"seed": 7, "epochs": 2, "window_rows": 64},
    {"shuffle": None, "drop_last": True},
    {"drop": [0, 5, "pad"], "seed": 1},
    {"seqpos": slice(1, None), "provenance": True},
    {"seqpos": [0, 3], "dtype": "float32", "rank": 1, "world_size": 3},
    {"max_norm": 1e30, "provenance": True, "rank": 0, "world_size": 2},
)


def flat(batch: Any) -> list[Any]:
    """All parts of a batch, to be compared."""
    if isinstance(batch, Batch):
        return [*flat(batch.values), *map(bits, (batch.sequences, batch.positions, batch.tokens))]
    if isinstance(batch, dict):
        return [(hook, bits(values)) for hook, values in batch.items()]
    return [bits(batch)]


@pytest.mark.parametrize(
    ("name", "options"),
    [*((WHOLE, options) for options in ORDERS), *((COMPRESSED, ORDERS[n]) for n in (0, 4))],
    ids=str,
)
def test_loaders(name: str, options: dict[str, Any], opened: Open, local: Open) -> None:
    options = {"shuffle": "window", "batch_size": 50, **options}
    for hooks in (RESID, ["blocks.*.hook_resid_post", Z]):
        with local(name).loader(hooks, **options) as ours, opened(name).loader(hooks, **options) as theirs:
            assert (theirs.n_rows, theirs.n_batches) == (ours.n_rows, ours.n_batches)
            for n, (here, there) in enumerate(zip(ours, theirs, strict=True)):
                assert flat(there) == flat(here), n
            assert theirs.state_dict() == ours.state_dict()
            last = ours.n_batches - 1
            assert flat(theirs.batch(last)) == flat(ours.batch(last))
            assert [*map(bits, theirs.rows(last))] == [*map(bits, ours.rows(last))]
            with pytest.raises(IndexError):
                theirs.batch(theirs.n_batches)


def test_loaders_go_on_where_others_were(opened: Open, local: Open) -> None:
    options: dict[str, Any] = {"shuffle": "window", "batch_size": 50, "drop": [3]}
    with local(WHOLE).loader(RESID, **options) as ours, opened(WHOLE).loader(RESID, **options) as theirs:
        next(ours)
        next(ours)
        theirs.load_state_dict(ours.state_dict())
        assert [flat(batch) for batch in theirs] == [flat(batch) for batch in ours]
        with (
            opened(WHOLE).loader(RESID, **options | {"drop": [4, 5]}) as other,
            pytest.raises(LoaderError, match="drops"),
        ):
            other.load_state_dict(ours.state_dict())


def test_a_mask_of_ones_own(opened: Open, local: Open) -> None:
    mask = np.arange(N) % 2 == 0
    options: dict[str, Any] = {"shuffle": "window", "batch_size": 32, "mask": mask}
    with local(WHOLE).loader(RESID, **options) as ours, opened(WHOLE).loader(RESID, **options) as theirs:
        assert [flat(batch) for batch in theirs] == [flat(batch) for batch in ours]


def test_loaders_refuse_alike(opened: Open) -> None:
    store = opened(WHOLE)
    for wrong in (
        {"drop": ["bos"]},
        {"seqpos": [LENGTH]},
        {"batch_size": 0},
        {"rank": 2},
        {"max_norm": -1.0},
    ):
        with pytest.raises(LoaderError):
            store.loader(RESID, **{"batch_size": 8, "shuffle": "window", **wrong})  # type: ignore[arg-type]
    with pytest.raises(HookError):
        store.loader("blocks.5.hook_resid_post", batch_size=8)
    with pytest.raises((LoaderError, NotCommittedError)):
        opened(GROWN).loader(RESID, batch_size=8, shuffle="window")


def test_pickled(opened: Open) -> None:
    import pickle

    with opened(WHOLE).loader(RESID, batch_size=50, shuffle="window", drop=[7]) as loader:
        next(loader)
        with pickle.loads(pickle.dumps(loader)) as again:
            assert [flat(batch) for batch in again] == [flat(batch) for batch in loader]


@pytest.mark.parametrize("name", NAMES)
def test_zarr(name: str, opened: Open, local: Open) -> None:
    group = opened(name).zarr
    ours = local(name)
    rows = slice(0, 16) if name == GROWN else slice(None)
    for hook in ours.hooks:
        values = np.asarray(group["acts"][hook][rows])  # type: ignore[index]
        assert bits(values) == bits(ours[hook].numpy(rows))
    assert bits(np.asarray(group["tokens"])) == bits(ours.tokens[:N])
