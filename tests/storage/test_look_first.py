"""Storage that takes a second create for an overwrite: nothing that is there is lost."""

import contextlib
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from actstore.errors import PlanMismatchError, StorageError
from actstore.extraction.claim import claim
from actstore.storage.blobs import BlobInfo, Blobs, Bytes
from actstore.storage.fsspec_files import RemoteBlobs
from actstore.storage.look_first import LookFirst
from actstore.storage.probing import probe
from actstore.store.format.layout import ROOT_METADATA
from actstore.store.records.commit import tokens_key
from actstore.store.records.manifest import MANIFEST_KEY, shards_key, statistics_key
from actstore.store.records.seal import seal
from actstore.store.records.shard_writer import put
from actstore.testing.blobs import BlobsConformance
from tests.storage.watched import CHANGES, watched
from tests.store.arrays import encoded
from tests.store.example import example_plan, example_tokens
from tests.store.runs import begin_run, bytes_below, write_run

PLAN = example_plan()


class Overwriting(RemoteBlobs):
    """Storage that ignores the conditions of writes, and says that they held."""

    def __init__(self) -> None:
        super().__init__(f"memory://{uuid.uuid4().hex}")
        self.is_emulated = False

    def create(
        self,
        key: str,
        parts: Sequence[Bytes],
        *,
        metadata: Mapping[str, str] | None = None,  # noqa: ARG002
    ) -> bool:
        self._fs.pipe_file(self._path(key), b"".join(bytes(part) for part in parts))
        return True

    def replace(self, key: str, parts: Sequence[Bytes], *, expected: str) -> bool:  # noqa: ARG002
        return self.create(key, parts)


@pytest.fixture
def bare() -> Blobs:
    return Overwriting()


@pytest.fixture
def blobs(bare: Blobs) -> Blobs:
    return LookFirst(bare)


class TestConformance(BlobsConformance):
    @pytest.fixture
    def blobs(self, bare: Blobs) -> Blobs:
        return LookFirst(bare)


def test_the_storage_below_really_overwrites(bare: Blobs) -> None:
    assert probe(bare) is False
    claim(bare, PLAN)
    bare.create(ROOT_METADATA, [b"somebody else's"])
    claim(bare, PLAN)
    assert bytes(bare.read(ROOT_METADATA)) != b"somebody else's"


@pytest.mark.parametrize("place", [ROOT_METADATA, "tokens/zarr.json"])
def test_claim_keeps_the_hierarchy_of_somebody_else(blobs: Blobs, place: str) -> None:
    claim(LookFirst(spare := Overwriting()), PLAN)
    assert place in bytes_below(spare)
    blobs.create(place, [b"somebody else's"])
    with pytest.raises(StorageError, match="something else is at this place"):
        claim(blobs, PLAN)
    assert bytes(blobs.read(place)) == b"somebody else's"


def test_claim_keeps_the_plan_of_somebody_else(blobs: Blobs) -> None:
    claim(blobs, PLAN)
    before = bytes_below(blobs)
    with pytest.raises(PlanMismatchError, match="another run has just started a different plan"):
        claim(blobs, example_plan("bfloat16"))
    assert bytes_below(blobs) == before


def test_tokens_that_are_there_stay(blobs: Blobs) -> None:
    begin_run(blobs, PLAN)
    before = bytes_below(blobs)
    for layout in PLAN.token_arrays():
        other = example_tokens(PLAN)[layout.path.rsplit("/", 1)[-1]] + 1
        assert not put(blobs, layout, 0, encoded(layout, 0, other)).is_own
    assert not blobs.create(tokens_key(PLAN.run), [b"{}"])
    assert bytes_below(blobs) == before


def test_a_sealed_store_is_not_written_again(bare: Blobs) -> None:
    calls = watched(bare)
    write_run(bare, PLAN)
    seal(LookFirst(bare))
    sealed = bytes_below(bare)
    bare.delete(MANIFEST_KEY)
    seal(LookFirst(calls))
    assert calls.of(CHANGES) == [MANIFEST_KEY]
    assert bytes_below(bare) == sealed
    assert {shards_key(PLAN.run), statistics_key(PLAN.run)} <= sealed.keys()


def test_a_manifest_that_came_meanwhile_is_not_overwritten(bare: Blobs) -> None:
    """Another process seals after this one found that there is no manifest."""
    write_run(bare, PLAN)
    looks = []

    def sealed_by_another(name: str, key: str) -> None:
        if (name, key) == ("head", MANIFEST_KEY):
            looks.append(key)
            if len(looks) == 1:
                seal(LookFirst(bare))

    calls = watched(bare, after=sealed_by_another)
    seal(LookFirst(calls))
    assert len(looks) > 1
    assert MANIFEST_KEY not in calls.of(CHANGES)


def test_a_tag_that_is_not_the_present_one_replaces_nothing(bare: Blobs, blobs: Blobs) -> None:
    blobs.create("a", [b"one"])
    assert not blobs.replace("a", [b"two"], expected="another")
    assert not blobs.replace("b", [b"two"], expected="another")
    assert bytes_below(bare) == {"a": b"one"}


def test_of_two_threads_that_create_one_key_one_is_told_so() -> None:
    """They meet between the look and the write, where nothing keeps them apart."""
    gate = threading.Barrier(2)

    class Meeting(Overwriting):
        def head(self, key: str) -> BlobInfo | None:
            found = super().head(key)
            with contextlib.suppress(threading.BrokenBarrierError):
                gate.wait(0.2)
            return found

    blobs = Meeting()
    with ThreadPoolExecutor(2) as threads:
        # Two wrappers, as two writers of one process have.
        made = [threads.submit(LookFirst(blobs).create, "a", [bytes([i])]) for i in range(2)]
        created = [each.result() for each in made]
    assert sorted(created) == [False, True]
    assert bytes(blobs.read("a")) == bytes([created.index(True)])
