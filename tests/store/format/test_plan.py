"""The sizes and counts of a plan are those of the stored objects."""

import itertools

import pytest

from actstore.storage.local import LocalBlobs
from actstore.storage.partial_files import PARTIAL
from actstore.store.format.layout import PAGE
from actstore.store.format.plan import Plan
from actstore.store.records.seal import seal
from tests.store.example import HOOKS, N, example_plan, example_values, write_store


@pytest.mark.parametrize("n_sequences", [1, 16, 37, 1500])
def test_counts_are_those_of_the_finished_store(local: LocalBlobs, n_sequences: int) -> None:
    plan = example_plan("bfloat16", n_sequences=n_sequences)
    write_store(local, plan, example_values(plan), range(plan.n_segments))
    seal(local)
    files = [path for path in local.root.rglob("*") if path.is_file()]
    assert not list((local.root / PARTIAL).glob("*"))
    assert len(files) == plan.n_objects
    shards = [path for path in files if path.name.startswith("c.")]
    assert sum(path.stat().st_size for path in shards) == plan.nbytes
    acts = [path for path in shards if path.is_relative_to(local.root / "acts")]
    assert sum(path.stat().st_size for path in acts) == plan.activation_nbytes


@pytest.mark.parametrize("n_sequences", [1, 15, 16, 17, 37, 64])
def test_segments_cover_every_sequence_once(n_sequences: int) -> None:
    plan = example_plan(n_sequences=n_sequences)
    rows = [row for segment in plan.segments() for row in range(segment.start, segment.stop)]
    assert rows == list(range(n_sequences))
    assert [segment.index for segment in plan.segments()] == list(range(plan.n_segments))
    assert all(segment.n_sequences > 0 for segment in plan.segments())


def test_each_segment_is_one_shard_of_every_hook() -> None:
    plan = example_plan()
    for hook in plan.request.hooks:
        layout = plan.activations(hook)
        assert layout.n_shards == plan.n_segments
        assert [layout.rows_in(i) for i in range(3)] == [s.n_sequences for s in plan.segments()]
        assert layout.shape == (N, plan.context_length, *hook.shape)
        assert layout.axes == ("sequence", "position", *hook.axes)


def test_hooks_keep_their_order() -> None:
    assert example_plan().hook_names == HOOKS


@pytest.mark.parametrize("length", [1, 7, 128, 1000, 4096, 100_000])
def test_token_shards_are_whole_pages_and_chunks(length: int) -> None:
    request = example_plan().request
    tokens = request.tokens.model_copy(update={"context_length": length})
    plan = example_plan(n_sequences=5000).model_copy(
        update={"request": request.model_copy(update={"tokens": tokens})}
    )
    for layout in plan.token_arrays():
        assert layout.shard_rows % layout.chunk_rows == 0
        assert layout.shard_rows * layout.row_nbytes % PAGE == 0
    assert len({layout.shard_rows for layout in plan.token_arrays()}) == 1


def test_plans_differ_when_anything_does() -> None:
    plans = [example_plan(), example_plan("float16"), example_plan(n_sequences=38)]
    assert all(a != b for a, b in itertools.combinations(plans, 2))
    assert Plan.from_bytes(plans[0].to_bytes(), "") == plans[0]
