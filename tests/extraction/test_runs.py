"""Stores that grow: more hooks and more tokens as further runs, by one process and by several, with real models."""

import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import zarr
from fsspec.implementations.local import LocalFileSystem

import actstore
from actstore.errors import JobError, NotCommittedError, PlanMismatchError, StorageError
from actstore.extraction.claim import claim
from actstore.extraction.computing import inline
from actstore.extraction.computing.worker import WorkerSpec
from actstore.extraction.events import Event, SegmentDone
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.locking.lease import LEASES
from actstore.store.records.commit import commit_key, read_commit
from actstore.store.statistics.merging import merge
from tests.conftest import TinyModel
from tests.faults.child import Child
from tests.store.runs import bytes_below

Fields = dict[str, Any]
A, B, C = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_k"
WIDE, SCALE = "blocks.0.mlp.hook_post", "blocks.1.ln1.hook_scale"
MANIFEST = "_actstore/manifest.json"
N, LENGTH, N_MORE = 40, 32, 20


@pytest.fixture(scope="module")
def base(tiny_model: TinyModel, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Fields:
    """Fields of a job of one hook over 40 sequences, 3 segments, and the finished store of it; not to be changed."""
    fields = {
        "model": str(tiny_model("llama")),
        "tokens": str(text_file),
        "documents": "paragraph",
        "hooks": [A],
        "context_length": LENGTH,
        "max_tokens": N * LENGTH,
        "batch_size": 8,
        "segment_size": 16,
        "out": str(tmp_path_factory.mktemp("base") / "store"),
    }
    extract(fields)
    return fields


@pytest.fixture
def job(base: Fields, tmp_path: Path) -> Fields:
    """The same fields for a copy of the store, which the test may change."""
    shutil.copytree(base["out"], tmp_path / "store")
    return base | {"out": str(tmp_path / "store")}


@pytest.fixture(scope="module")
def one_run(base: Fields, tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    """A store of A, B and C from one extraction."""
    return extract(base | {"hooks": [A, B, C], "out": str(tmp_path_factory.mktemp("one") / "store")})


@pytest.fixture(scope="module")
def grown(base: Fields, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All objects of the store of A after adding B and C."""
    out = tmp_path_factory.mktemp("grown") / "store"
    shutil.copytree(base["out"], out)
    extract(base | {"hooks": [B, C], "out": str(out)})
    return files(out)


@pytest.fixture
def more_text(text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Fields that ask for other tokens."""
    path = tmp_path / "more.txt"
    path.write_text(text_file.read_text()[100_000:120_000])
    return {"tokens": str(path), "max_tokens": N_MORE * LENGTH}


def extract(fields: Fields, **changes: Any) -> actstore.Store:
    actstore.extract(actstore.plan(**fields | changes))
    return actstore.open(fields["out"])


def files(url: str | Path) -> dict[str, bytes]:
    return bytes_below(open_blobs(str(url)))


def interrupt(fields: Fields, run: str = "0001") -> None:
    """An extraction that ends when it would commit segment 1; segment 0 is committed then."""
    create = LocalBlobs.create
    first_is_committed = threading.Event()

    def fail(blobs: LocalBlobs, key: str, *args: Any, **keywords: Any) -> bool:
        if key == commit_key(run, 1):
            assert first_is_committed.wait(120)  # two segments are written side by side
            raise StorageError("the disk was pulled out")
        is_new = create(blobs, key, *args, **keywords)
        if key == commit_key(run, 0):
            first_is_committed.set()
        return is_new

    planned = actstore.plan(**fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalBlobs, "create", fail)
        with pytest.raises(StorageError, match="pulled out"):
            actstore.extract(planned)
    assert not actstore.open(fields["out"]).is_complete


def check_clean(url: str) -> None:
    verification = actstore.verify(url)
    assert verification.findings == ()
    assert verification.is_complete


def same_statistics(left: Any, right: Any) -> None:
    assert left.count == right.count
    for field in ("mean", "mean_norm", "mean_squared_norm", "max_abs"):
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field))


def test_hooks_are_added_and_nothing_else_changes(
    base: Fields, one_run: actstore.Store, grown: dict[str, bytes], job: Fields
) -> None:
    before = files(base["out"])
    assert {key for key in before if grown.get(key) != before[key]} == {MANIFEST}
    added = extract(job | {"hooks": [B, C]})
    assert files(job["out"]) == grown
    assert len(grown) == len(before) + added.runs[1].plan.n_objects
    assert [run.plan.hook_names for run in added.runs] == [(A,), (C, B)]
    assert added.is_complete
    assert added.hooks == one_run.hooks
    assert added.shape == one_run.shape == (N, LENGTH)
    for hook in (A, B, C):
        assert torch.equal(added[hook][:], one_run[hook][:])
        same_statistics(added.stats(hook), one_run.stats(hook))
    for name in ("tokens", "lengths", "documents", "offsets"):
        np.testing.assert_array_equal(getattr(added, name)[:], getattr(one_run, name)[:])
    for hook, values in one_run.cache([3, 30]).items():
        assert torch.equal(added.cache([3, 30])[hook], values)
    check_clean(job["out"])


def test_what_is_there_is_not_extracted_again(
    job: Fields, grown: dict[str, bytes], more_text: Fields
) -> None:
    extract(job | {"hooks": [B, C]})
    for hooks in ([A], [B, C], [A, B, C], [C], [A, B]):
        run = actstore.plan(**job | {"hooks": hooks})
        assert run.pending == ()
        assert run.packed is None
        assert actstore.extract(run).n_tokens_computed == 0
    assert actstore.plan(**job | {"append": True}).pending == ()
    assert files(job["out"]) == grown


def test_the_command_that_adds_hooks_in_a_way_of_their_own_can_be_repeated(job: Fields) -> None:
    job |= {"hooks": [A, B], "segment_size": 32, "compression": "lz4", "covariance": True}
    store = extract(job)
    assert [run.plan.request.compression for run in store.runs] == [None, "lz4"]
    assert store.stats(B).covariance is not None
    before = files(job["out"])
    assert actstore.plan(**job).pending == ()
    extract(job)
    assert files(job["out"]) == before
    check_clean(job["out"])


def test_compressed_values_are_the_same(job: Fields, one_run: actstore.Store) -> None:
    store = extract(job | {"hooks": [B], "compression": "zstd"})
    assert torch.equal(store[B][:], one_run[B][:])
    assert torch.equal(store[B][[39, 0, 17], 3:5], one_run[B][[39, 0, 17], 3:5])


def test_interrupted_while_hooks_are_added(
    job: Fields, grown: dict[str, bytes], one_run: actstore.Store
) -> None:
    interrupt(job | {"hooks": [B, C]})
    before = files(job["out"])
    store = actstore.open(job["out"])
    assert torch.equal(store[A][:], one_run[A][:])
    rows = store.committed_rows()
    assert rows[:16].all()
    assert not rows[16:32].any()
    assert torch.equal(store[B][:16], one_run[B][:16])
    with pytest.raises(NotCommittedError, match="run the extraction again"):
        store[B][16]
    for hooks, message in (
        ([B], f"hooks is {C}, {B} in the store, {B} was asked for"),
        ([WIDE], rf"run 0001 of the store .* is not complete; .* \(hooks {C} and {B}\), then add {WIDE}"),
    ):
        with pytest.raises(PlanMismatchError, match=message):
            actstore.plan(**job | {"hooks": hooks})
    assert actstore.plan(**job).pending == ()
    assert files(job["out"]) == before
    report = actstore.extract(actstore.plan(**job | {"hooks": [B, C]}))
    assert 0 < report.n_segments_before < 3
    assert files(job["out"]) == grown


def test_hooks_are_added_to_whole_runs_only(base: Fields, tmp_path: Path) -> None:
    job = base | {"out": str(tmp_path / "store")}
    interrupt(job, "0000")
    before = files(job["out"])
    with pytest.raises(PlanMismatchError, match=rf"run 0000 .* is not complete; .* then add {B}"):
        actstore.plan(**job | {"hooks": [B]})
    assert files(job["out"]) == before
    extract(job)
    assert files(job["out"]) == files(base["out"])


def test_rows_of_another_size_have_segments_of_their_own(job: Fields, one_run: actstore.Store) -> None:
    # 4 bytes a position: 32 rows of 32 positions are a page.
    with pytest.raises(JobError, match="segment_size 16 must be a multiple of 32"):
        actstore.plan(**job | {"hooks": [SCALE]})
    del job["segment_size"]
    store = extract(job | {"hooks": [SCALE, B]})
    sizes = [run.plan.segment_size for run in store.runs]
    assert sizes[0] == 16
    assert sizes[1] % 32 == 0
    assert torch.equal(store[B][:], one_run[B][:])
    assert store[SCALE].shape == (N, LENGTH, 1)
    assert store.is_complete
    check_clean(job["out"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype is float32 in the store, bfloat16 was asked for"),
        ({"batch_size": 4}, "batch_size is 8 in the store, 4 was asked for"),
        ({"model": "gpt2"}, "model.fingerprint is crc32c:"),
        ({"context_length": 16}, "tokens.context_length is 32 in the store, 16 was asked for"),
        ({"seed": 5}, r"tokens.seed is null in the store, 5 was asked for.* give --append"),
        ({"max_tokens": 60 * LENGTH}, "tokens.max_tokens is 1280 in .* give --append"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_added_is_refused(
    job: Fields, tiny_model: TinyModel, change: Fields, message: str
) -> None:
    before = files(job["out"])
    if "model" in change:
        # The same tokens and sizes, other weights.
        change = {"model": str(tiny_model("llama", rms_norm_eps=1e-3))}
    with pytest.raises(PlanMismatchError, match=message):
        actstore.plan(**job | {"hooks": [B]} | change)
    if "append" not in message:
        with pytest.raises(PlanMismatchError, match=message):
            actstore.plan(**job | {"hooks": [B], "append": True} | change)
    assert files(job["out"]) == before


def test_tokens_are_added(job: Fields, base: Fields, more_text: Fields, tmp_path: Path) -> None:
    before = files(job["out"])
    with pytest.raises(PlanMismatchError, match="to add these tokens .* as a further run, give --append"):
        actstore.plan(**job | more_text)
    more = more_text | {"seed": 3, "hooks": [A, B], "append": True}
    store = extract(job | more)
    after = files(job["out"])
    assert {key for key in before if after[key] != before[key]} == {MANIFEST}
    assert len(after) == len(before) + store.runs[1].plan.n_objects

    first = actstore.open(base["out"])
    second = extract(job | more | {"out": str(tmp_path / "alone")})
    assert store.shape == (N + N_MORE, LENGTH)
    assert store.n_tokens == first.n_tokens + second.n_tokens
    for name in ("tokens", "lengths", "documents", "offsets"):
        whole = np.concatenate([getattr(part, name)[:] for part in (first, second)])
        np.testing.assert_array_equal(getattr(store, name)[:], whole)
    values = torch.cat([first[A][:], second[A][:]])
    assert torch.equal(store[A][:], values)
    assert torch.equal(store[A][[N + 3, 1, N, N - 1]], values[[N + 3, 1, N, N - 1]])
    assert torch.equal(store[A][N - 2 : N + 2, 5], values[N - 2 : N + 2, 5])

    # Of all tokens: exactly what all records together say, and what the values say.
    blobs = open_blobs(job["out"])
    records = [
        read_commit(blobs, run.plan, index).statistics[A]
        for run in store.runs
        for index in range(run.plan.n_segments)
    ]
    statistics = store.stats(A)
    same_statistics(statistics, merge(records, (64,)))
    assert statistics.count == (N + N_MORE) * LENGTH
    np.testing.assert_allclose(statistics.mean, values.double().mean((0, 1)).numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(statistics.mean_norm, values.double().norm(dim=-1).mean().item(), rtol=1e-6)

    # One hook is missing over the first part.
    assert not store.committed_rows()[:N].any()
    assert store.committed_rows()[N:].all()
    with pytest.raises(NotCommittedError, match="not extracted over the tokens of run 0000; extract it over"):
        store[B][N - 1]
    assert torch.equal(store[B][N:], second[B][:])
    assert torch.equal(store.cache([N + 1])[B], second.cache([1])[B])
    with pytest.raises(NotCommittedError, match="extract it over them"):
        store.cache([N - 1, N])
    assert torch.equal(store.cache([N - 1, N], names_filter=A)[A], values[[N - 1, N]])

    store = extract(job | {"hooks": [A, B]})
    assert [run.plan.hook_names for run in store.runs] == [(A,), (A, B), (B,)]
    assert [run.plan.tokens_of for run in store.runs] == ["0000", "0001", "0000"]
    assert store.committed_rows().all()
    assert {key for key in after if files(job["out"])[key] != after[key]} == {MANIFEST}
    assert torch.equal(store.cache([N - 1, N])[B][1], second[B][0])
    for fields in (job, job | more, job | {"hooks": [B]}):
        assert actstore.plan(**fields).pending == ()
    assert store[A].zarr.shape == (N, LENGTH, 64)
    group = zarr.open_group(job["out"], mode="r")
    np.testing.assert_array_equal(np.asarray(group[f"parts/0001/acts/{A}"][:]), second[A].numpy())  # type: ignore[index]
    assert np.asarray(group[f"acts/{B}"][:]).shape == (N, LENGTH, 64)  # type: ignore[index]
    check_clean(job["out"])


def test_hooks_are_added_over_added_tokens(job: Fields, more_text: Fields, one_run: actstore.Store) -> None:
    extract(job | more_text | {"append": True})
    store = extract(job | more_text | {"hooks": [B], "compression": "lz4"})
    assert [run.plan.tokens_of for run in store.runs] == ["0000", "0001", "0001"]
    model = actstore.HookedModel.from_pretrained(job["model"], device="cpu")
    _, live = model.run_with_cache(torch.from_numpy(store.tokens[N : N + 8]).long(), names_filter=[B])
    assert torch.equal(store[B][N : N + 8], live[B])
    with pytest.raises(NotCommittedError, match="not extracted over the tokens of run 0000"):
        store[B][0]
    store = extract(job | {"hooks": [B]})
    assert torch.equal(store[B][:N], one_run[B][:])
    assert store.committed_rows().all()
    check_clean(job["out"])


def test_interrupted_while_tokens_are_added(job: Fields, more_text: Fields, tmp_path: Path) -> None:
    job |= more_text | {"append": True}
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(job["out"], undisturbed)
    extract(job, out=str(undisturbed))
    interrupt(job)
    store = actstore.open(job["out"])
    assert store.shape == (N + N_MORE, LENGTH)
    assert store.committed_rows()[: N + 16].all()
    assert not store.committed_rows()[N + 16 :].any()
    store.tokens[:]
    extract(job)
    assert files(job["out"]) == files(undisturbed)


@pytest.fixture
def both() -> Iterator[Callable[..., list[str]]]:
    """``both(one, other)``: two extractions that have been planned before either goes on; what each ended in."""
    children: list[Child] = []

    def run(*jobs: Fields) -> list[str]:
        children.extend(Child(job, stop="planned") for job in jobs)
        for child in children:
            child.reached()
        for child in children:
            child.go()
        outcomes = [child.outcome() for child in children]
        assert [outcome.exitcode for outcome in outcomes] == [0] * len(jobs)
        return [outcome.error for outcome in outcomes]

    yield run
    for child in children:
        child.kill()


def test_two_that_add_different_hooks_at_once(
    job: Fields, one_run: actstore.Store, both: Callable[..., list[str]]
) -> None:
    jobs = [job | {"hooks": [hook]} for hook in (B, C)]
    errors = both(*jobs)
    lost = [i for i, error in enumerate(errors) if error]
    assert len(lost) == 1
    assert errors[lost[0]].startswith("PlanMismatchError: another run has just started a different plan at ")
    won = (B, C)[1 - lost[0]]
    store = actstore.open(job["out"])
    assert [run.plan.hook_names for run in store.runs] == [(A,), (won,)]
    check_clean(job["out"])
    store = extract(jobs[lost[0]])
    assert store.is_complete
    for hook in (A, B, C):
        assert torch.equal(store[hook][:], one_run[hook][:])
    check_clean(job["out"])


@pytest.mark.parametrize("is_strict", [False, True])
def test_two_that_add_the_same_hooks_at_once(
    job: Fields, grown: dict[str, bytes], both: Callable[..., list[str]], is_strict: bool
) -> None:
    job |= {"hooks": [B, C], "strict": is_strict}
    assert both(job, job) == ["", ""]
    assert files(job["out"]) == grown
    check_clean(job["out"])


def spoil(out: str, hook: str, segment: int) -> Path:
    """Leave one shard with other last bits, as an attempt on another machine that was killed before the commit."""
    root = Path(out)
    (root / MANIFEST).unlink()
    (root / commit_key("0000", segment)).unlink()
    path = root / f"acts/{hook}/c.{segment}.0.0"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    return path


def test_a_store_with_an_adopted_shard_is_clean(job: Fields) -> None:
    path = spoil(job["out"], A, 1)
    spoilt = path.read_bytes()
    before = actstore.open(job["out"])
    store = extract(job)
    assert path.read_bytes() == spoilt
    assert store.is_complete
    assert not before.is_complete
    check_clean(job["out"])


def test_strict_extraction_computes_such_a_segment_anew(job: Fields, base: Fields) -> None:
    spoil(job["out"], A, 1)
    (Path(job["out"]) / "_actstore/leases").mkdir()
    extract(job | {"strict": True})
    objects = files(job["out"])
    assert not [key for key in objects if "leases" in key]
    assert objects == files(base["out"])


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_strict_extraction_gives_the_same_bytes(base: Fields, tmp_path: Path, kind: str) -> None:
    out = str(tmp_path / "store") if kind == "local" else f"memory://{uuid.uuid4().hex}"
    extract(base | {"out": out, "strict": True})
    assert files(out) == files(base["out"])


class Share(LocalFileSystem):  # type: ignore[misc]
    """A file system that fsspec does not know to refuse a second create of a key."""

    protocol = "share"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, str):
            path = path.removeprefix("share://")
        return super()._strip_protocol(path)


@pytest.fixture
def share(tmp_path: Path) -> str:
    fsspec.register_implementation("share", Share, clobber=True)
    return f"share://{tmp_path}/shared"


def test_only_one_process_commits_where_storage_cannot_decide(
    base: Fields, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Share, "__init__", lambda self, **_: LocalFileSystem.__init__(self, auto_mkdir=True))
    run = actstore.plan(**base | {"out": share})
    assert not run.is_conditional
    claim(run.blobs, run.plan)
    assert run.packed is not None
    run.packed.store(run.blobs, run.plan)

    worker = WorkerSpec(share, base["model"], is_conditional=False).start()
    done = worker.run(1)
    worker.close()
    assert done.record is not None
    assert done.record.segment == 1
    assert run.blobs.head(commit_key("0000", 1)) is None
    assert actstore.open(share).n_committed == 0

    events: list[Event] = []
    actstore.extract(replace(run, committed=frozenset()), on_event=events.append)
    assert sorted(event.segment for event in events if isinstance(event, SegmentDone)) == [0, 1, 2]
    assert all(event.record is None for event in events if isinstance(event, SegmentDone))
    assert files(share.removeprefix("share://")) == files(base["out"])


def test_who_has_lost_its_turn_commits_nothing_for_its_workers(
    base: Fields, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where storage cannot decide, only this process commits, and only while it holds its lease."""
    monkeypatch.setattr(Share, "__init__", lambda self, **_: LocalFileSystem.__init__(self, auto_mkdir=True))
    run = actstore.plan(**base | {"out": share})
    execute, folder = inline.run, Path(share.removeprefix("share://"))

    def losing(spec: Any, pending: Any, resources: Any, on_segment: Any) -> None:
        def on_segment_later(done: SegmentDone) -> None:
            shutil.rmtree(folder / LEASES)
            on_segment(done)

        execute(spec, pending[:1], resources, on_segment_later)

    monkeypatch.setattr(inline, "run", losing)
    with pytest.raises(StorageError, match="took over"):
        actstore.extract(run)
    assert not list((folder / "_actstore/runs/0000").glob("commits/*"))
