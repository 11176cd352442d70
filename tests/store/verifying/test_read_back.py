"""Reading back notices whatever is missing, whether the run was sealed just now or long ago."""

from collections.abc import Callable

import pytest

from actstore.errors import IncompleteError, StorageError
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import commit_key, plan_key, tokens_key
from actstore.store.records.manifest import MANIFEST_KEY, shards_key, statistics_key, update_manifest
from actstore.store.records.seal import seal
from actstore.store.verifying.read_back import read_back
from tests.store.example import example_plan
from tests.store.runs import write_run
from tests.store.verifying.test_verify import flip

PLAN = example_plan()
RUN = PLAN.run


def forget_run(blobs: Blobs) -> None:
    update_manifest(blobs, lambda manifest: manifest.model_copy(update={"runs": ()}))


def remove_records(blobs: Blobs) -> None:
    for segment in range(PLAN.n_segments):
        blobs.delete(commit_key(RUN, segment))


GONE: dict[str, tuple[Callable[[Blobs], None], str]] = {
    "record": (lambda b: b.delete(commit_key(RUN, 1)), "1 of 3 segments .* no commit record, .* segment 1; "),
    "every record": (remove_records, "3 of 3 segments"),
    "tokens record": (lambda b: b.delete(tokens_key(RUN)), "tokens.json does not exist"),
    "plan": (lambda b: b.delete(plan_key(RUN)), "the plan of run 0000 .* is gone"),
    "manifest": (lambda b: b.delete(MANIFEST_KEY), "manifest of .* does not name run 0000"),
    "run in the manifest": (forget_run, "manifest of .* does not name run 0000"),
}


@pytest.mark.parametrize("kind", GONE)
@pytest.mark.parametrize("are_read", [False, True])
def test_what_is_gone_is_noticed(local: LocalBlobs, kind: str, are_read: bool) -> None:
    write_run(local, PLAN)
    assert seal(local) == {RUN}
    assert seal(local) == frozenset()
    assert set(read_back(local, PLAN).hooks) <= set(PLAN.hook_names)
    remove, message = GONE[kind]
    remove(local)
    with pytest.raises(IncompleteError, match=message) as caught:
        read_back(local, PLAN, are_records_read=are_read)
    assert "run the same command again" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [commit_key(RUN, 2), statistics_key(RUN)])
def test_what_is_damaged_is_noticed(local: LocalBlobs, key: str) -> None:
    write_run(local, PLAN)
    seal(local)
    flip(local, key, 300)
    with pytest.raises(StorageError, match="is damaged"):
        read_back(local, PLAN)


@pytest.mark.parametrize("key", [shards_key(RUN), statistics_key(RUN)])
def test_what_the_manifest_points_to_is_looked_at(local: LocalBlobs, key: str) -> None:
    write_run(local, PLAN)
    seal(local)
    local.delete(key)
    with pytest.raises(StorageError, match="is not what the manifest points to; run `actstore verify"):
        read_back(local, PLAN)
