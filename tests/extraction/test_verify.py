"""A damaged store after verify, repair and extract equals that of an undisturbed run."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.extraction.verify import verify
from actstore.storage.local import LocalBlobs
from actstore.store.format.batches import batches_of
from actstore.store.format.shard import crc32c, encode
from actstore.store.format.shard_reader import decode
from actstore.store.records.commit import ObjectRecord, commit_key, plan_key, read_commit, tokens_key
from actstore.store.records.manifest import MANIFEST_KEY, shards_key, statistics_key
from actstore.store.records.seal import seal
from actstore.store.statistics.moments import recompute
from actstore.store.statistics.norms import side_by_side
from tests.faults.store_bytes import differences, store_bytes
from tests.store.verifying.test_verify import cut, flip, overwrite

Fields = dict[str, Any]
HOOK = "blocks.1.hook_mlp_out"
SHARD = f"acts/{HOOK}/c.2.0.0"
LAST = f"acts/{HOOK}/c.6.0.0"
RUN = "0000"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "store"


@pytest.fixture
def job(fields: Fields, whole: Path) -> Fields:
    """Job fields of a finished store, extracted once and copied."""
    if not whole.exists():
        actstore.extract(actstore.plan(**fields | {"out": str(whole)}))
        assert verify(str(whole)).findings == ()
    shutil.copytree(whole, fields["out"])
    return fields


def remove_two(blobs: LocalBlobs) -> None:
    blobs.delete(SHARD)
    blobs.delete(LAST)


def remove_record_and_flip(blobs: LocalBlobs) -> None:
    flip(blobs, commit_key(RUN, 2), 300)
    flip(blobs, SHARD, 3)


def swap(blobs: LocalBlobs) -> None:
    first, second = bytes(blobs.read(SHARD)), bytes(blobs.read(f"acts/{HOOK}/c.3.0.0"))
    overwrite(blobs, SHARD, second)
    overwrite(blobs, f"acts/{HOOK}/c.3.0.0", first)


DAMAGE: dict[str, tuple[Any, set[int]]] = {
    "shard missing": (lambda b: b.delete(SHARD), {2}),
    "shards missing": (remove_two, {2, 6}),
    "shard short": (lambda b: cut(b, SHARD, 1000), {2}),
    "value flipped": (lambda b: flip(b, SHARD, 1000), {2}),
    "index flipped": (lambda b: flip(b, SHARD, -7), {2}),
    "shards swapped": (swap, {2, 3}),
    "record missing": (lambda b: b.delete(commit_key(RUN, 2)), {2}),
    "record flipped": (lambda b: flip(b, commit_key(RUN, 2), 300), {2}),
    "record and shard flipped": (remove_record_and_flip, {2}),
    "record of another segment": (
        lambda b: overwrite(b, commit_key(RUN, 2), bytes(b.read(commit_key(RUN, 1)))),
        {2},
    ),
    "tokens missing": (lambda b: b.delete("tokens/c.0.0"), set()),
    "tokens flipped": (lambda b: flip(b, "offsets/c.0.0", 77), set()),
    "tokens record missing": (lambda b: b.delete(tokens_key(RUN)), set()),
    "tokens record flipped": (lambda b: flip(b, tokens_key(RUN), 77), set()),
    "metadata missing": (lambda b: b.delete("zarr.json"), set()),
    "metadata flipped": (lambda b: flip(b, f"acts/{HOOK}/zarr.json", 40), set()),
    "plan flipped": (lambda b: flip(b, plan_key(RUN), 300), set()),
    "manifest flipped": (lambda b: flip(b, MANIFEST_KEY, 300), set()),
    "table missing": (lambda b: b.delete(shards_key(RUN)), set()),
    "statistics flipped": (lambda b: flip(b, statistics_key(RUN), 300), set()),
}
"""Cases: the damage, and the segments that must be computed again."""


@pytest.mark.parametrize("kind", DAMAGE)
def test_next_extraction_makes_exactly_what_was_damaged(job: Fields, whole: Path, kind: str) -> None:
    damage, segments = DAMAGE[kind]
    damage(LocalBlobs(job["out"]))
    verification = verify(job["out"], repair=True)
    assert {finding.segment for finding in verification.damage} - {None} == segments
    assert not verification.is_clean
    assert verification.n_removed + verification.n_rewritten
    report = actstore.extract(actstore.plan(**job))
    n_rows = sum(4 if segment == 6 else 16 for segment in segments)
    assert report.n_segments_before == (7 if kind == "plan flipped" else 7 - len(segments))
    assert report.n_tokens_computed == n_rows * 32
    assert differences(store_bytes(job["out"]), store_bytes(str(whole))) == []
    after = verify(job["out"])
    assert after.findings == ()
    assert after.is_complete


@pytest.mark.parametrize("kind", ["tokens record missing", "tokens record flipped"])
@pytest.mark.parametrize("is_sealed", [True, False])
def test_record_of_tokens_is_made_again_without_the_text(
    job: Fields, whole: Path, kind: str, is_sealed: bool
) -> None:
    blobs = LocalBlobs(job["out"])
    if not is_sealed:
        for key in (MANIFEST_KEY, shards_key(RUN), statistics_key(RUN)):
            blobs.delete(key)
    DAMAGE[kind][0](blobs)
    flip(blobs, f"acts/{HOOK}/zarr.json", 40)
    verification = verify(job["out"], repair=True)
    assert (verification.n_removed, verification.n_rewritten) == (0, 2)
    after = verify(job["out"])
    assert after.is_clean
    assert after.is_complete
    if not is_sealed:
        seal(blobs)
    assert differences(store_bytes(job["out"]), store_bytes(str(whole))) == []


def test_shards_whose_record_is_lost_are_taken_over(job: Fields, whole: Path) -> None:
    blobs = LocalBlobs(job["out"])
    before = blobs.head(SHARD)
    flip(blobs, commit_key(RUN, 2), 300)
    verify(job["out"], repair=True)
    actstore.extract(actstore.plan(**job))
    assert blobs.head(SHARD) == before
    assert differences(store_bytes(job["out"]), store_bytes(str(whole))) == []


def test_deep_check_passes_over_a_run_without_its_tokens(job: Fields) -> None:
    blobs = LocalBlobs(job["out"])
    for key in (MANIFEST_KEY, shards_key(RUN), statistics_key(RUN), tokens_key(RUN), "tokens/c.0.0"):
        blobs.delete(key)
    verification = verify(job["out"], deep=True)
    assert verification.findings == ()
    assert verification.n_rows_recomputed == 0
    assert not verification.is_complete


def test_what_extraction_cannot_take_over_is_removed(job: Fields, whole: Path) -> None:
    """Damaged shards of a killed writer: extraction advises a repair, and that helps."""
    blobs = LocalBlobs(job["out"])
    for key in (MANIFEST_KEY, shards_key(RUN), statistics_key(RUN), commit_key(RUN, 2), tokens_key(RUN)):
        blobs.delete(key)
    flip(blobs, SHARD, -7)
    flip(blobs, "tokens/c.0.0", 7)
    with pytest.raises(actstore.errors.ActstoreError, match="verify .* --repair"):
        actstore.extract(actstore.plan(**job))
    verify(job["out"], repair=True)
    actstore.extract(actstore.plan(**job))
    assert differences(store_bytes(job["out"]), store_bytes(str(whole))) == []


def change_row(url: str) -> None:
    """Change one stored row, and make every checksum and statistic right again."""
    blobs = LocalBlobs(url)
    plan = actstore.open(url).plan
    hook = next(hook for hook in plan.request.hooks if hook.name == HOOK)
    layout = plan.activations(hook)
    data = np.frombuffer(bytes(blobs.read(SHARD)), np.uint8).copy()
    rows = data[: layout.data_nbytes(2)].view("<f4").reshape(-1, *layout.shape[1:])
    rows[0] = rows[0][::-1].copy()
    overwrite(blobs, SHARD, data.tobytes())
    record = read_commit(blobs, plan, 2)
    shard = ObjectRecord(key=SHARD, nbytes=len(data), crc32c=crc32c(data))
    lengths = np.full(16, 32)
    statistics, own = recompute(
        hook, rows[:16], plan.request.dtype, lengths, batches_of(plan.request, lengths)
    )
    of_norms = plan.norm_array()
    side = np.array(decode(of_norms, 2, blobs.read(of_norms.key(2))))
    norms = {name: side[:, number] for number, name in enumerate(of_norms.hooks)} | {HOOK: own}
    made = encode(of_norms, 2, side_by_side(plan, 2, norms))
    overwrite(blobs, made.key, b"".join(bytes(part) for part in made.parts))
    changes = {
        "shards": record.shards | {HOOK: shard},
        "norms": ObjectRecord(key=made.key, nbytes=made.nbytes, crc32c=made.crc32c),
        "statistics": record.statistics | {HOOK: statistics},
    }
    overwrite(blobs, commit_key(RUN, 2), record.model_copy(update=changes).to_bytes())
    for key in (MANIFEST_KEY, shards_key(RUN), statistics_key(RUN)):
        blobs.delete(key)
    seal(blobs)


def test_only_the_model_tells_that_a_row_is_another(job: Fields, whole: Path) -> None:
    change_row(job["out"])
    assert verify(job["out"]).findings == ()
    verification = verify(job["out"], deep=True, repair=True, n_rows=100)
    (finding,) = verification.damage
    assert (finding.key, finding.run, finding.segment) == (SHARD, RUN, 2)
    assert finding.problem.startswith(f"is not what the model computes: {HOOK} of sequence 32 is ")
    assert verification.n_rows_recomputed == 100
    report = actstore.extract(actstore.plan(**job))
    assert report.n_tokens_computed == 16 * 32
    assert differences(store_bytes(job["out"]), store_bytes(str(whole))) == []


def test_deep_check_of_a_whole_store_of_two_runs(job: Fields) -> None:
    actstore.extract(actstore.plan(**job | {"hooks": [*job["hooks"], "blocks.0.attn.hook_z"]}))
    verification = verify(job["out"], deep=True, n_rows=5)
    assert verification.findings == ()
    assert verification.n_rows_recomputed == 10


def test_damage_of_a_run_that_adds_hooks(job: Fields) -> None:
    job |= {"hooks": [*job["hooks"], "blocks.0.attn.hook_z"]}
    actstore.extract(actstore.plan(**job))
    before = store_bytes(job["out"])
    flip(LocalBlobs(job["out"]), "acts/blocks.0.attn.hook_z/c.3.0.0.0", 9)
    verification = verify(job["out"], repair=True)
    assert [(finding.run, finding.segment) for finding in verification.damage] == [("0001", 3)]
    assert actstore.extract(actstore.plan(**job)).n_tokens_computed == 16 * 32
    assert differences(store_bytes(job["out"]), before) == []


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(actstore.errors.StorageError, match="there is no actstore store at"):
        verify(str(tmp_path))
