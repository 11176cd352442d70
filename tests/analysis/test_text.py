"""The text of a store, compared with the text that was extracted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import actstore
from actstore.analysis.top.top_activations import top_activations
from actstore.errors import TokensError

TEXTS = ["The ghost of my father, naïve and 👻.", "x", "Who goes there? Stand, ho!"]


@pytest.fixture(scope="module")
def store(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    folder = tmp_path_factory.mktemp("text")
    (folder / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    fields: dict[str, Any] = {
        "model": str(tiny_model("llama")),
        "tokens": str(folder / "texts.txt"),
        "documents": "line",
        "packing": "document",
        "hooks": "blocks.0.hook_resid_post",
        "context_length": 64,
        "out": str(folder / "store"),
    }
    actstore.extract(actstore.plan(**fields))
    return actstore.open(fields["out"])


def test_text_is_that_of_the_source(store: actstore.Store) -> None:
    assert [store.text(number) for number in range(3)] == [f"<bos>{text}" for text in TEXTS]
    assert store.text(-1) == store.text(2)


def test_text_around_a_position(store: actstore.Store) -> None:
    tokenizer = AutoTokenizer.from_pretrained(store.plan.request.model.name)
    ids = tokenizer("<bos>" + TEXTS[2], add_special_tokens=False)["input_ids"]
    assert store.text(2, 3, window=2) == tokenizer.decode(ids[1:6])
    assert store.text(2, -1, window=1) == tokenizer.decode(ids[-2:])
    assert store.text(2, 0, window=0) == "<bos>"
    assert store.text(2, 5, window=1000) == store.text(2)


def test_str_tokens_are_those_of_each_token(store: actstore.Store) -> None:
    tokenizer = AutoTokenizer.from_pretrained(store.plan.request.model.name)
    ids = tokenizer("<bos>" + TEXTS[2], add_special_tokens=False)["input_ids"]
    assert store.str_tokens(2) == [tokenizer.decode([token]) for token in ids]
    assert "".join(store.str_tokens(2)) == store.text(2)
    assert store.tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ((3,), "sequences 0 to 2"),
        ((-4,), "sequences 0 to 2"),
        ((1, 9), "has 2 tokens"),
        ((1, -3), "has 2 tokens"),
    ],
    ids=["above", "below", "behind", "before"],
)
def test_places_that_are_not_there(store: actstore.Store, place: Any, says: str) -> None:
    with pytest.raises(IndexError, match=says):
        store.text(*place)
    if len(place) == 1:
        for read in (store.str_tokens, lambda i: store.tokens[i], lambda i: store[store.hooks[0]][i]):
            with pytest.raises(IndexError):
                read(*place)


def test_context_of_a_top_row(store: actstore.Store) -> None:
    values = store["blocks.0.hook_resid_post"][:].float().numpy()
    top = top_activations(store, "blocks.0.hook_resid_post", [4], k=2, above=-1e9)
    real = np.arange(values.shape[1]) < store.lengths[:][:, None]
    where = np.unravel_index(np.where(real, values[..., 4], -np.inf).argmax(), real.shape)
    sequence, position = int(where[0]), int(where[1])
    context = top.context(0, 0, before=3, after=2)
    tokens = store.str_tokens(sequence)
    assert context.tokens == tuple(tokens[max(0, position - 3) : position + 3])
    assert context.tokens[context.at] == tokens[position]
    assert (context.sequence, context.position) == (sequence, position)
    assert f"[[{tokens[position]}]]" in str(context)
    assert context.value == pytest.approx(values[sequence, position, 4])
    with pytest.raises(IndexError, match="feature 1 has no row 0 of 1 feature with up to 2 rows each"):
        top.context(1, 0)


def test_tokenizer_that_is_gone(tmp_path: Path) -> None:
    from actstore.storage.local import LocalBlobs
    from tests.store.example import example_plan, example_values, write_store

    plan = example_plan()
    write_store(LocalBlobs(tmp_path), plan, example_values(plan), range(plan.n_segments))
    with pytest.raises(TokensError, match="has tokens without a text"):
        actstore.open(str(tmp_path)).text(0)
