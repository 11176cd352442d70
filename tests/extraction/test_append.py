"""More of the same text: only missing sequences are added, and changed text is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

import actstore
from actstore.errors import PlanMismatchError, TokensError
from actstore.extraction.planning.tokenising import source_files

Fields = dict[str, Any]


def jsonl(path: Path, rows: range) -> Path:
    """A file with one document of token ids a line, each of another length."""
    lines = [
        json.dumps({"input_ids": [2 + (row * 7 + i) % 200 for i in range(20 + row % 13)]}) for row in rows
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("seed", [None, 3])
def test_more_of_the_same_text_adds_only_what_is_not_there(
    fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    source = jsonl(tmp_path / "text.jsonl", range(60))
    more: Fields = fields | {"tokens": str(source), "seed": seed, "context_length": 16, "batch_size": 4}
    more = {
        name: value
        for name, value in more.items()
        if name not in ("documents", "segment_size", "packing", "max_tokens")
    }
    actstore.extract(actstore.plan(**more, max_tokens=16 * 20))
    # The same file by another name.
    monkeypatch.chdir(tmp_path)
    report = actstore.extract(
        actstore.plan(**more | {"tokens": "text.jsonl"}, max_tokens=16 * 32, append=True)
    )
    assert (report.run, report.n_tokens) == ("0001", 16 * 12)
    whole = actstore.extract(actstore.plan(**more | {"out": str(tmp_path / "whole")}, max_tokens=16 * 32))
    store, at_once = actstore.open(fields["out"]), actstore.open(str(tmp_path / "whole"))
    assert whole.n_tokens == store.n_tokens
    assert sorted(map(tuple, store.tokens[:].tolist())) == sorted(map(tuple, at_once.tokens[:].tolist()))
    again = actstore.plan(**more, max_tokens=16 * 32)
    assert not again.pending
    with pytest.raises(TokensError, match="there is nothing to add"):
        actstore.plan(**more, max_tokens=16 * 24, append=True)


@pytest.mark.parametrize("is_large", [False, True])
def test_text_that_changed_is_not_gone_on_with(
    fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    """A large source is compared by the tokens that are in the store, when they are made again."""
    if is_large:
        monkeypatch.setattr(source_files, "MAX_CHECKED", 0)
    problem = (
        "has other tokens than .* the text has changed" if is_large else "its files have changed, or are not"
    )
    source = jsonl(tmp_path / "text.jsonl", range(60))
    more = {
        name: value
        for name, value in fields.items()
        if name not in ("documents", "segment_size", "packing", "max_tokens")
    }
    more |= {"tokens": str(source), "context_length": 16, "batch_size": 4}
    actstore.extract(actstore.plan(**more, max_tokens=16 * 20))
    text = source.read_text()
    source.write_text(text.replace("[2,", "[3,", 1))  # of the same size
    with pytest.raises(PlanMismatchError, match=problem):
        actstore.plan(**more, max_tokens=16 * 32, append=True)
    source.write_text(text + text)
    with pytest.raises(
        PlanMismatchError, match="its files have changed, or are not the first ones that this job reads"
    ):
        actstore.plan(**more, append=True)


def test_commits_without_a_plan_are_not_taken_for_those_of_a_new_run(fields: Fields) -> None:
    actstore.extract(actstore.plan(**fields))
    lost = Path(fields["out"], "_actstore/runs/0001/commits/00000000.json")
    lost.parent.mkdir(parents=True)
    lost.write_text("{}")
    report = actstore.extract(actstore.plan(**fields | {"hooks": ["blocks.0.hook_attn_out"]}))
    assert report.run == "0002"
    assert report.n_segments_before == 0
    assert lost.read_text() == "{}"
