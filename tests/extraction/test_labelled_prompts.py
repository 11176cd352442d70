"""Prompts of a table with labels, and chats, given in memory: the last token of each against plain transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import actstore
from actstore.errors import PlanMismatchError, TokensError
from actstore.storage.local import LocalBlobs
from tests.conftest import TinyModel
from tests.store.runs import bytes_below
from tests.tokens.chats.shapes import LLAMA

TEXTS = ["My lord, I came", "to see", "", "your father's funeral, and more of it", "My lord, I came"]
LABELS = ["verse", "prose", "none", "verse", None]
HOOK = "blocks.1.hook_resid_post"
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Who goes there?"}, {"role": "assistant", "content": "A friend."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Stand!"}],
]


@pytest.fixture
def job(tiny_model: TinyModel, tmp_path: Path) -> dict[str, Any]:
    return {"model": str(tiny_model("llama")), "hooks": HOOK, "out": str(tmp_path / "store")}


def table(labels: list[Any]) -> pd.DataFrame:
    """A table whose index is not that of its rows."""
    return pd.DataFrame({"label": labels, "text": TEXTS, "number": range(5)}).set_index("number", drop=False)[
        ::-1
    ]


@pytest.mark.parametrize("kind", ["pandas", "arrow", "dataset"])
def test_labels_stay_with_their_prompts(job: dict[str, Any], kind: str) -> None:
    frame = table(LABELS)
    given: Any = frame
    if kind != "pandas":
        given = pa.Table.from_pandas(frame, preserve_index=False)
    if kind == "dataset":
        given = Dataset(given)
    actstore.extract(**job, tokens=given, keep=["label", "number"], positions="last")
    store = actstore.open(job["out"])
    assert store.per_sequence("label").to_pylist() == LABELS[::-1]
    assert store.column("number").to_pylist() == [4, 3, 2, 1, 0]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    last = store[HOOK].last()
    for row, text in enumerate(TEXTS[::-1]):
        ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            alone = model(ids, output_hidden_states=True).hidden_states[2][0, -1]
        torch.testing.assert_close(last[row], alone, atol=1e-5, rtol=1e-4)


def test_other_labels_are_other_prompts(job: dict[str, Any]) -> None:
    actstore.extract(**job, tokens=table(LABELS), keep=["label"])
    assert not actstore.plan(**job, tokens=table(LABELS), keep=["label"]).pending
    with pytest.raises(PlanMismatchError, match=r"tokens\.files is memory"):
        actstore.plan(**job, tokens=table(LABELS[::-1]), keep=["label"])


def test_other_listed_positions_are_other_prompts(job: dict[str, Any]) -> None:
    frame = pd.DataFrame({"text": TEXTS[:2], "at": [[1], [1]]})
    actstore.extract(**job, tokens=frame, positions="column:at")
    assert actstore.open(job["out"]).positions is not None
    with pytest.raises(PlanMismatchError, match=r"tokens\.files"):
        actstore.plan(**job, tokens=frame.assign(at=[[1], [0]]), positions="column:at")


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (TEXTS, "the prompts are in no table"),
        (table(LABELS), "has no column colour; its columns are: label, text"),
    ],
    ids=["list", "table"],
)
def test_columns_that_are_not_there(job: dict[str, Any], tokens: Any, says: str) -> None:
    with pytest.raises(TokensError, match=says):
        actstore.plan(**job, tokens=tokens, keep=["colour"])


def test_chats_in_memory_are_those_of_a_file(job: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(LLAMA)
    settings: dict[str, Any] = {"chat_template": str(tmp_path / "template.jinja"), "positions": "role:user"}
    pd.DataFrame({"messages": CHATS}).to_json(tmp_path / "chats.jsonl", orient="records", lines=True)
    of_file = job | settings | {"tokens": str(tmp_path / "chats.jsonl"), "context_length": "auto"}
    actstore.extract(**of_file | {"out": str(tmp_path / "of_file")})
    expected = bytes_below(LocalBlobs(tmp_path / "of_file"))
    tables: list[Any] = [
        CHATS,
        iter(CHATS),
        pd.DataFrame({"messages": CHATS}),
        Dataset.from_dict({"messages": CHATS}),
    ]
    for number, chats in enumerate(tables):
        out = tmp_path / str(number)
        actstore.extract(**job | settings | {"tokens": chats, "out": str(out), "batch_size": 32})
        arrays = {key: data for key, data in bytes_below(LocalBlobs(out)).items() if "_actstore" not in key}
        assert arrays == {key: data for key, data in expected.items() if "_actstore" not in key}
        assert np.array_equal(
            actstore.open(str(out)).roles[:], actstore.open(str(tmp_path / "of_file")).roles[:]
        )
