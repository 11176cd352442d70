"""Tokenizers: loading from folders, special ids, fingerprints, and encoding."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from actstore.errors import TokensError
from actstore.tokens import (
    encode_documents,
    load_tokenizer,
    open_source,
    special_id,
    token_documents,
    tokenizer_sha256,
)
from tests.commands import command
from tests.tokens.conftest import train


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


def test_loads_a_folder(folder: Path, tokenizer: Any) -> None:
    loaded = load_tokenizer(str(folder))
    assert loaded("Who goes there?")["input_ids"] == tokenizer("Who goes there?")["input_ids"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{bad"}, "cannot be loaded: Expecting property name"),
        (
            {"config.json": '{"model_type": "gpt2"}'},
            "has no vocabulary; its folder lacks the tokenizer files",
        ),
        ({}, "cannot be loaded: "),
        (
            {
                "config.json": '{"model_type": "none", "auto_map": {"AutoConfig": "evil.Config"}}',
                "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}',
                "evil.py": "raise SystemExit('ran')",
            },
            "cannot be loaded: The repository .* contains custom code",
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(TokensError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_hub_name_without_a_network_is_one_sentence() -> None:
    code = "from actstore.tokens import load_tokenizer; load_tokenizer('no-such/model', 'v1')"
    done = command(code=code)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "actstore.errors.TokensError: the tokenizer no-such/model at revision v1 cannot be loaded: "
    )


@pytest.mark.parametrize(("token", "expected"), [("bos", 0), ("eos", 1), (5, 5), (0, 0), (None, None)])
def test_special_ids(tokenizer: Any, token: Any, expected: int | None) -> None:
    assert special_id(tokenizer, token, option="begin_batch_token") == expected


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (
            "sep",
            (
                "no SEP token, which begin_batch_token='sep' needs; name another one with begin_batch_token "
                r"\(--begin-batch-token\): 'bos', 'eos', a token id or 'none'"
            ),
        ),
        ("cls", "begin_batch_token is 'cls'; choose 'bos', 'eos', 'sep', 'pad', a token id or 'none'"),
        (10**6, "has ids 0 to .*, but begin_batch_token is 1000000"),
        (-1, "but begin_batch_token is -1"),
        (True, "begin_batch_token is True; choose"),
    ],
)
def test_special_ids_that_are_not_there(tokenizer: Any, token: Any, message: str) -> None:
    with pytest.raises(TokensError, match=message):
        special_id(tokenizer, token, option="begin_batch_token")


def test_encoding_is_what_calling_the_tokenizer_gives(tokenizer: Any, play: str) -> None:
    texts = ["", *play.split("\n\n")[:50], "<bos>A special token in the text<eos>", "naïve 🦜"]
    encoded = encode_documents(tokenizer, texts)
    assert all(ids.dtype == np.int32 for ids in encoded)
    assert [ids.tolist() for ids in encoded] == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(encoded[3]) == texts[3]
    assert encode_documents(tokenizer, []) == []


def test_truncation_and_padding_left_by_an_earlier_call_do_not_matter(tokenizer: Any, play: str) -> None:
    before = encode_documents(tokenizer, ["Who goes there?", play])
    fingerprint = tokenizer_sha256(tokenizer)
    tokenizer("Who goes there?", truncation=True, max_length=2)
    assert tokenizer_sha256(tokenizer) == fingerprint
    after = encode_documents(tokenizer, ["Who goes there?", play])
    assert [ids.tolist() for ids in after] == [ids.tolist() for ids in before]


def test_a_tokenizer_with_its_own_way_of_encoding_is_called(tokenizer: Any) -> None:
    class Doubling(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, *args: Any, **options: Any) -> Any:
            encoded = super()._encode_plus(*args, **options)
            encoded["input_ids"] = [ids * 2 for ids in encoded["input_ids"]]
            return encoded

    doubling = Doubling(tokenizer_object=tokenizer.backend_tokenizer)
    once = encode_documents(tokenizer, ["Who goes there?"])[0].tolist()
    assert encode_documents(doubling, ["Who goes there?"])[0].tolist() == once * 2


def test_a_long_document_is_encoded_whole_and_without_a_warning(
    tokenizer: Any, play: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = play * 30
    assert len(text) > 10**6
    tokenizer.model_max_length = 16
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        (ids,) = encode_documents(tokenizer, [text])
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
        tokenizer.model_max_length = 10**30
    assert tokenizer.decode(ids) == text
    assert not caplog.records


def test_the_fingerprint_is_the_same_in_another_process(folder: Path) -> None:
    code = f"from actstore.tokens import *; print(tokenizer_sha256(load_tokenizer({str(folder)!r})))"
    done = command(code=code)
    assert done.stdout.strip() == tokenizer_sha256(load_tokenizer(str(folder)))
    assert len(done.stdout.strip()) == 64


def test_the_fingerprint_tells_tokenizers_apart(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["merges"].pop()
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert tokenizer_sha256(load_tokenizer(str(tmp_path))) != tokenizer_sha256(tokenizer)


def test_documents_of_a_text_source_are_encoded_with_their_numbers(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Who goes there?\n\nThe ghost\n")
    documents = list(token_documents(open_source(str(tmp_path / "a.txt"), documents="line"), tokenizer))
    assert [number for number, _ in documents] == [0, 1, 2]
    assert [tokenizer.decode(ids) for _, ids in documents] == ["Who goes there?", "", "The ghost"]


def test_documents_of_a_token_source_pass_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [3, 1]}\n{"input_ids": []}\n{"input_ids": [7]}\n')
    documents = list(token_documents(open_source(str(tmp_path / "a.jsonl"))))
    assert [(number, ids.tolist()) for number, ids in documents] == [(0, [3, 1]), (1, []), (2, [7])]


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Who goes there?")
    with pytest.raises(TokensError, match=r"a.txt holds text, so a tokenizer is needed"):
        list(token_documents(open_source(str(tmp_path / "a.txt"))))


def test_the_package_imports_neither_torch_nor_transformers_nor_datasets() -> None:
    code = "import sys, actstore.tokens; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_a_tokenizer_puts_around_a_text_is_left_to_packing() -> None:
    """Most tokenizers of language models put a BOS token before a text, and packing would put a second one there."""
    opening, plain = train(300), train(300)
    opening.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", opening.bos_token_id)]
    )
    texts = ["Who goes there?", "I am thy father's spirit", ""]
    assert [ids[0] for ids in opening(texts)["input_ids"]] == [opening.bos_token_id] * 3
    encoded = [ids.tolist() for ids in encode_documents(opening, texts)]
    assert encoded == [ids.tolist() for ids in encode_documents(plain, texts)]
    assert not any(opening.bos_token_id in ids for ids in encoded)
