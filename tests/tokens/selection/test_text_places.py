"""Where documents go on behind a text, against the text that the tokens stand for."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from actstore.errors import TokensError
from actstore.tokens.selection.text_places import TextPlaces
from actstore.tokens.source import open_source

LINES = [
    "Question: 2 + 2? Answer: four, Answer: five",
    "no such word",
    "Answer:",
    "Answer:x",
    "",
    "Müller said: Answer: naïve façade",
]


@pytest.fixture
def places(tiny_model: object, tmp_path: Path) -> TextPlaces:
    (tmp_path / "text.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))  # type: ignore[operator]
    return TextPlaces(open_source(str(tmp_path / "text.txt"), documents="line"), tokenizer, "Answer:")


def test_tokens_behind_the_last_place_spell_what_follows_it(places: TextPlaces) -> None:
    assert [documents for _, documents in places.batches()] == [LINES]
    assert places.starts.keys() == {0, 3, 5}
    for number, start in places.starts.items():
        ids = places._tokenizer(LINES[number], add_special_tokens=False)["input_ids"]
        follows = LINES[number][LINES[number].rindex("Answer:") + len("Answer:") :]
        assert places._tokenizer.decode(ids[start:]) == follows
    places.forget_before(4)
    assert places.starts.keys() == {5}


def test_token_ids_have_no_text(tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2]}\n')
    with pytest.raises(TokensError, match="^positions 'after:x' need text, and .* has token ids"):
        TextPlaces(open_source(str(tmp_path / "ids.jsonl")), None, "x")
