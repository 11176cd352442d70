"""Every change of a table of kept columns is found, and mended as far as the rest of the store can."""

import random
import uuid
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

import actstore
from actstore.errors import StorageError
from actstore.storage.blobs import Blobs
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import Plan
from actstore.store.records.commit import TokensRecord, columns_key, tokens_key
from actstore.store.records.manifest import shards_key, statistics_key
from actstore.store.records.seal import seal
from actstore.store.records.shards_table import of_plan
from actstore.store.verifying.repair import repair
from tests.store.example import example_tokens, write_array
from tests.store.kept import keeping, kept_table, name_tables, write_kept_store
from tests.store.runs import bytes_below
from tests.store.verifying.test_verify import checked, flip, make_store, overwrite

RUN = "0000"
FIRST, SECOND = columns_key(RUN, 0), columns_key(RUN, 1)
SUMMARY = {shards_key(RUN), statistics_key(RUN)}


@pytest.fixture
def blobs() -> Blobs:
    return open_blobs(f"memory://{uuid.uuid4().hex}")


def problems(blobs: Blobs) -> list[tuple[str, str]]:
    return [(f.key, f.problem) for f in checked(blobs).findings if f.severity == "damage"]


def test_a_whole_store_has_no_findings(blobs: Blobs) -> None:
    write_kept_store(blobs)
    assert problems(blobs) == []
    seal(blobs)
    assert problems(blobs) == []


def truncate(blobs: Blobs, plan: Plan) -> None:
    del plan
    overwrite(blobs, SECOND, bytes(blobs.read(SECOND))[:-3])


def change_a_type(blobs: Blobs, plan: Plan) -> None:
    blobs.delete(SECOND)
    other = kept_table(100, 40).set_column(1, "label", pa.array([0.5] * 40))
    name_tables(blobs, plan, kept_table(0, 100), other)


def count_less(blobs: Blobs, plan: Plan) -> None:
    """Name fewer rows than there are documents."""
    documents = example_tokens(plan)["documents"].copy()
    documents[0, 0] = 140
    offsets = np.where(documents < 0, -1, 0).astype("<i4")
    for name, values in (("documents", documents), ("offsets", offsets)):
        layout = plan.token_array(name)
        blobs.delete(layout.key(0))
        (record,) = write_array(blobs, layout, values, range(1))
        there = TokensRecord.read(blobs, tokens_key(RUN))
        shards = tuple(record if shard.key == record.key else shard for shard in there.shards)
        overwrite(blobs, tokens_key(RUN), there.model_copy(update={"shards": shards}).to_bytes())


def rename(blobs: Blobs, plan: Plan) -> None:
    blobs.delete(SECOND)
    name_tables(blobs, plan, kept_table(0, 100), kept_table(100, 40).rename_columns(["id", "lable"]))


def name_none(blobs: Blobs, plan: Plan) -> None:
    name_tables(blobs, plan)


def swap(blobs: Blobs, plan: Plan) -> None:
    there = TokensRecord.read(blobs, tokens_key(plan.run))
    swapped = there.model_copy(update={"tables": there.tables[::-1]})
    overwrite(blobs, tokens_key(plan.run), swapped.to_bytes())


DAMAGE: dict[str, tuple[Callable[[Blobs, Plan], object], str, str]] = {
    "missing": (lambda blobs, _: blobs.delete(FIRST), FIRST, "is missing"),
    "flipped": (lambda blobs, _: flip(blobs, FIRST, 99), FIRST, "has crc32c "),
    "short": (truncate, SECOND, "has "),
    "other type": (change_a_type, SECOND, "has columns of other types than the tables before"),
    "other columns": (rename, SECOND, "it does not have the columns that the plan keeps"),
    "fewer rows": (count_less, tokens_key(RUN), "names tables of 140 rows, and there is a document 140"),
    "not named": (name_none, tokens_key(RUN), "does not name the tables of the kept columns"),
    "swapped": (swap, tokens_key(RUN), "does not name the tables of the kept columns"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_in_its_place(blobs: Blobs, kind: str) -> None:
    change, key, problem = DAMAGE[kind]
    plan = write_kept_store(blobs)
    change(blobs, plan)
    ((found, what),) = problems(blobs)
    assert found == key
    assert what.startswith(problem)


def test_every_flipped_bit_is_found(blobs: Blobs) -> None:
    write_kept_store(blobs)
    rng = random.Random(0)
    for key in (FIRST, SECOND):
        whole = bytes(blobs.read(key))
        for _ in range(20):
            bit = rng.randrange(len(whole) * 8)
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            overwrite(blobs, key, bytes(data))
            assert [found for found, _ in problems(blobs)] == [key], bit
            with pytest.raises(
                StorageError, match="is damaged: .*not what was committed; run `actstore verify"
            ):
                _ = actstore.open(blobs.url).rows
        overwrite(blobs, key, whole)
    assert problems(blobs) == []


def test_tables_where_none_belong(blobs: Blobs) -> None:
    plan = make_store(blobs, sealed=False)
    name_tables(blobs, keeping(plan, "id", "label"), kept_table(0, 3))
    assert problems(blobs) == [(tokens_key(RUN), "does not name the tables of the kept columns")]


def repaired(blobs: Blobs) -> set[str]:
    check = checked(blobs)
    removed = repair(blobs, check, check.findings)
    assert problems(blobs) == []
    return set(removed)


@pytest.mark.parametrize("kind", ["missing", "flipped", "short"])
def test_a_damaged_table_goes_with_the_tokens_record(blobs: Blobs, kind: str) -> None:
    change, key, _ = DAMAGE[kind]
    plan = write_kept_store(blobs)
    seal(blobs)
    whole = bytes_below(blobs)
    change(blobs, plan)
    there = blobs.head(key) is not None
    assert repaired(blobs) == SUMMARY | {tokens_key(RUN)} | ({key} if there else set())
    # The next run makes exactly these again.
    name = FIRST if key == FIRST else SECOND
    blobs.create(name, [whole[name]])
    blobs.create(tokens_key(RUN), [whole[tokens_key(RUN)]])
    seal(blobs)
    assert bytes_below(blobs) == whole


@pytest.mark.parametrize("kind", ["missing", "flipped", "not canonical"])
def test_the_table_of_shards_brings_the_tokens_record_back(blobs: Blobs, kind: str) -> None:
    plan = write_kept_store(blobs)
    seal(blobs)
    rows = of_plan(bytes(blobs.read(shards_key(RUN))), plan).to_pylist()
    assert [(row["array"], row["shard"], row["key"]) for row in rows[-2:]] == [
        ("_actstore/runs/0000/columns", 0, FIRST),
        ("_actstore/runs/0000/columns", 1, SECOND),
    ]
    whole = bytes_below(blobs)
    if kind == "flipped":
        flip(blobs, tokens_key(RUN), 30)
    elif kind == "not canonical":
        overwrite(blobs, tokens_key(RUN), respelled(whole[tokens_key(RUN)]))
    else:
        blobs.delete(tokens_key(RUN))
    assert repaired(blobs) == {tokens_key(RUN)}
    assert bytes_below(blobs) == whole


def respelled(document: bytes) -> bytes:
    """The same JSON with another space, and the checksum of that."""
    from actstore.store.format.shard import crc32c

    body = document.split(b"\n", 2)[2].replace(b'"format": 1', b'"format":  1')
    return b'{\n  "checksum": %d,\n' % crc32c(body) + body


@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_lost_record_and_a_damaged_table(blobs: Blobs, is_sealed: bool) -> None:
    """What nothing vouches for goes: all tables of an unfinished run, the damaged one of a finished run."""
    write_kept_store(blobs)
    if is_sealed:
        seal(blobs)
    flip(blobs, SECOND, 50)
    blobs.delete(tokens_key(RUN))
    removed = repaired(blobs)
    assert {SECOND} <= removed
    assert (FIRST in removed) == (not is_sealed)
    assert blobs.head(tokens_key(RUN)) is None


def test_other_files_beside_the_tables_stay(blobs: Blobs) -> None:
    write_kept_store(blobs)
    blobs.create("_actstore/runs/0000/columns/note.txt", [b"mine"])
    blobs.delete(tokens_key(RUN))
    repaired(blobs)
    assert blobs.head("_actstore/runs/0000/columns/note.txt") is not None
