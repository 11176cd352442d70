"""Token ids that come with the role and the message of each: from any source, in any packing, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import actstore
from actstore.cli.main import cli
from actstore.errors import JobError, PlanMismatchError, TokensError

Fields = dict[str, Any]


def rows(n: int) -> list[dict[str, Any]]:
    """Documents of ids, each a few messages with the template between them; some are empty."""
    random = np.random.default_rng(0)
    made: list[dict[str, Any]] = []
    for number in range(n):
        roles: list[int] = []
        turns: list[int] = []
        for turn in range(0 if number % 5 == 3 else 1 + number % 3):
            size = int(random.integers(1, 5))
            roles += [0] + [1 + int(random.integers(4))] * size
            turns += [-1] + [turn] * size
        ids = random.integers(2, 200, len(roles)).tolist()
        made.append({"input_ids": ids, "roles": roles, "turns": turns, "label": number})
    return made


GIVEN = rows(40)


@pytest.fixture
def job(fields: Fields) -> Fields:
    kept = {name: fields[name] for name in ("model", "out")}
    return kept | {
        "hooks": ["blocks.0.hook_resid_post"],
        "packing": "document",
        "token_roles": True,
        "pad_token": 1,
        "begin_batch_token": 0,
        "batch_size": 4,
    }


def source(kind: str, folder: Path) -> Any:
    table = pa.Table.from_pylist(GIVEN)
    if kind == "jsonl":
        (folder / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GIVEN))
        return str(folder / "ids.jsonl")
    if kind == "parquet":
        pq.write_table(table, folder / "ids.parquet", row_group_size=7)
        return str(folder / "ids.parquet")
    return table if kind == "arrow" else pd.DataFrame(GIVEN)


def check(store: actstore.Store) -> None:
    """Check each token against the lists of its document."""
    documents, offsets = store.documents[:], store.offsets[:]
    roles, turns = store.roles[:].tolist(), store.turns[:].tolist()
    for sequence, length in enumerate(store.lengths[:]):
        for position in range(store.shape[1]):
            found = roles[sequence][position], turns[sequence][position]
            number, offset = documents[sequence, position], offsets[sequence, position]
            if position >= length:
                assert found == (-1, -1)
            elif offset < 0:
                assert found == (0, -1)  # packing put it in
            else:
                assert found == (GIVEN[number]["roles"][offset], GIVEN[number]["turns"][offset])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "pandas"])
def test_roles_of_any_source_are_those_listed(job: Fields, tmp_path: Path, kind: str) -> None:
    given = source(kind, tmp_path)
    actstore.extract(**job, tokens=given, keep=["label"])
    store = actstore.open(job["out"])
    check(store)
    assert store.columns == ("label",)
    assert actstore.verify(job["out"]).findings == ()


@pytest.mark.parametrize(
    "change",
    [
        {"packing": "concat", "context_length": 6, "sequence_separator_token": 0},
        {"context_length": 5, "truncate": "left"},
        {"context_length": 5, "truncate": "right", "begin_batch_token": "none"},
        {"seed": 3},
        {"positions": "role:assistant"},
    ],
    ids=str,
)
def test_roles_follow_their_tokens_in_any_packing(job: Fields, tmp_path: Path, change: Fields) -> None:
    actstore.extract(**job | change, tokens=source("jsonl", tmp_path))
    store = actstore.open(job["out"])
    check(store)
    if "positions" in change:
        for sequence, row in enumerate(row for row in GIVEN if row["input_ids"]):
            chosen = (1 + np.flatnonzero(np.array(row["roles"]) == 3)).tolist()
            assert store.positions is not None
            assert store.positions[sequence, : store.counts[sequence]].tolist() == chosen
    info = CliRunner().invoke(cli, ["info", job["out"]])
    assert "token ids with roles and turns" in info.output


def test_other_roles_are_another_plan(job: Fields) -> None:
    actstore.extract(**job, tokens=pa.Table.from_pylist(GIVEN))
    changed = [row | {"roles": [4 if role == 1 else role for role in row["roles"]]} for row in GIVEN]
    with pytest.raises(PlanMismatchError, match=r"tokens\.files is"):
        actstore.extract(**job, tokens=pa.Table.from_pylist(changed))
    with pytest.raises(PlanMismatchError, match=r"tokens\.token_roles is true in the store"):
        actstore.extract(**job | {"token_roles": False}, tokens=pa.Table.from_pylist(GIVEN))


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"roles": [0, 2]}, TokensError, "roles of document 1 has 2 numbers, and the document has 3 tokens"),
        ({"turns": None}, TokensError, "turns of document 1 has 0 numbers, and the document has 3 tokens"),
        ({"roles": [0, 5, 5]}, TokensError, "roles of document 1 has 5; give 0 template, 1 system"),
        ({"roles": [-1, 2, 2]}, TokensError, "roles of document 1 has -1; give 0 template"),
        ({"turns": [0, 0, 0]}, TokensError, "roles and turns of document 1 contradict each other"),
        ({"roles": [0, 2, 0]}, TokensError, "roles and turns of document 1 contradict each other"),
        ({"roles": [0, 2, 3]}, TokensError, "roles of document 1 change within a message"),
        ({"roles": ["user"] * 3}, TokensError, "roles of document 1 is no list of whole numbers"),
        ({"roles": 3}, TokensError, "roles of document 1 is no list of whole numbers"),
        ({"column": "text"}, JobError, "token_roles is for token ids, and .* holds text"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    job: Fields, tmp_path: Path, change: Fields, error: type[Exception], problem: str
) -> None:
    row = {"input_ids": [5, 6, 7], "roles": [0, 2, 2], "turns": [-1, 0, 0], "text": "a"}
    column = {name: change[name] for name in change if name == "column"}
    lines = [row, row | {name: value for name, value in change.items() if name in row}]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(error, match=problem):
        actstore.plan(**job | column, tokens=str(tmp_path / "ids.jsonl"))
