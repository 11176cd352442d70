"""Special tokens of packing: those that the tokenizer or the embedding lacks, and advice that works."""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import actstore
from actstore.cli.main import LazyGroup, cli
from actstore.errors import TokensError
from actstore.extraction.planning.job import Job
from tests.conftest import TinyModel

OPTIONS = ("begin_batch_token", "begin_sequence_token", "sequence_separator_token", "pad_token")


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A model of 300 embeddings with text beside it, which the test may change."""
    made = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), made)
    (made / "text.txt").write_text("my lord\nwhat news\n" * 20)
    return made


@pytest.fixture
def documents(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """One document a row."""
    return {
        "model": str(folder),
        "tokens": str(folder / "text.txt"),
        "documents": "line",
        "packing": "document",
        "hooks": ["blocks.1.hook_resid_post"],
        "context_length": 16,
        "device": "cpu",
        "out": str(tmp_path / "store"),
    }


def change_tokenizer(folder: Path, **tokens: str | None) -> int:
    """Give the tokenizer these special tokens, or none, and return the number of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, token in tokens.items():
        if token is None:
            setattr(tokenizer, name, None)
        else:
            tokenizer.add_special_tokens({name: token})
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def test_advice_for_a_tokenizer_without_special_tokens_can_be_followed(
    folder: Path, documents: dict[str, Any]
) -> None:
    change_tokenizer(folder, bos_token=None, eos_token=None)
    with pytest.raises(
        TokensError, match=r"name another one with begin_batch_token \(--begin-batch-token\): a to"
    ):
        actstore.plan(**documents)
    documents["begin_batch_token"] = "none"
    with pytest.raises(
        TokensError, match=r"name one with pad_token \(--pad-token\): any token id will do, such as 0"
    ):
        actstore.plan(**documents)
    documents["pad_token"] = 0
    actstore.extract(actstore.plan(**documents))
    store = actstore.open(documents["out"])
    assert store.shape == (40, 16)
    lengths = store.lengths[:]
    assert 0 < lengths.max() < 16
    assert all((row[n:] == 0).all() for row, n in zip(store.tokens[:], lengths, strict=True))


def test_same_advice_on_the_command_line(folder: Path, documents: dict[str, Any]) -> None:
    change_tokenizer(folder, bos_token=None, eos_token=None)
    line = ["plan", "--begin-batch-token", "none", "--pad-token", "0"]
    for name, value in documents.items():
        line += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value)]
    result = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert result.exit_code == 0
    assert "40 sequences of 16" in result.output


def test_documents_of_ids_are_padded_without_a_tokenizer(
    folder: Path, documents: dict[str, Any], tmp_path: Path
) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"input_ids": [5, 6]}\n')
    job = {name: value for name, value in documents.items() if name != "documents"}
    plan = actstore.plan(**job | {"tokens": str(ids), "pad_token": 7})
    assert plan.plan.request.tokens.pad_token == 7
    with pytest.raises(
        TokensError, match="pad_token is 300, and the model .* embeddings for the ids 0 to 299 only"
    ):
        actstore.plan(**job | {"tokens": str(ids), "pad_token": 300})


@pytest.mark.parametrize("packing", ["document", "concat"])
@pytest.mark.parametrize("name", ["pad_token", "bos_token", "eos_token", "sep_token"])
def test_token_that_was_added_to_the_tokenizer_only(
    folder: Path, documents: dict[str, Any], name: str, packing: str
) -> None:
    n_tokens = change_tokenizer(folder, **{name: "<new>"})
    short = name.removesuffix("_token")
    option = {"pad": "pad_token", "bos": "begin_batch_token"}.get(short, "begin_sequence_token")
    job = documents | {"packing": packing, "context_length": 8}
    if option == "begin_sequence_token":
        job[option] = short
    if name == "pad_token" and packing == "concat":
        actstore.plan(**job)  # nothing is padded
        return
    with pytest.raises(TokensError) as caught:
        actstore.plan(**job)
    assert str(caught.value) == (
        f"the {short.upper()} token of the tokenizer {folder} has the id {n_tokens - 1}, and the model {folder} has "
        f"embeddings for the ids 0 to 299 only; name another token with {option} (--{option.replace('_', '-')})"
        f"{'' if short == 'pad' else ', or ' + repr('none') + ' for no token'}, or give the model that embedding and "
        "save it (model.resize_token_embeddings(len(tokenizer)), model.save_pretrained(folder))"
    )
    assert not Path(documents["out"]).exists()
    # Either cure helps.
    other = {option: "eos" if short != "eos" else "bos"}
    if packing == "concat":
        other["sequence_separator_token"] = "none"
    elif short == "eos":
        other["pad_token"] = "bos"
    actstore.plan(**job | other)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(n_tokens)
    model.save_pretrained(folder)
    actstore.plan(**job)


def test_text_that_holds_a_token_of_the_tokenizer_only(folder: Path, documents: dict[str, Any]) -> None:
    change_tokenizer(folder, sep_token="<new>")
    (folder / "text.txt").write_text("a<new>b\n")
    with pytest.raises(
        TokensError, match="document 0 has the token id 300 at offset 1, but ids must be 0 to 299"
    ):
        actstore.plan(**documents)
    assert not Path(documents["out"]).exists()


def test_rows_that_the_checkpoint_has_count_too(folder: Path, documents: dict[str, Any]) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 300', '"vocab_size": 400'))
    change_tokenizer(folder, sep_token="<a>", pad_token="<b>")
    with pytest.raises(TokensError, match="pad_token is 301, and the model .* for the ids 0 to 299 only"):
        actstore.plan(**documents | {"pad_token": 301})


def texts(path: Path) -> Iterator[str]:
    """All strings in a source file except docstrings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def test_options_that_errors_name_are_options_of_a_command() -> None:
    context = click.Context(cli)
    assert isinstance(cli, LazyGroup)
    commands = [cli.get_command(context, name) for name in cli.list_commands(context)]
    there = {
        option for command in commands if command for parameter in command.params for option in parameter.opts
    }
    there |= {"--head"}  # of `ray start`
    sources = sorted(Path(actstore.__file__).parent.rglob("*.py"))
    named = {
        (path.name, option)
        for path in sources
        for text in texts(path)
        for option in re.findall(r"--[a-z][a-z-]+[a-z]", text)
    }
    assert len(named) > 5
    assert {option for option in named if option[1] not in there} == set()


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_tokens_are_fields_of_a_job(option: str) -> None:
    assert option in Job.model_fields
    result = CliRunner().invoke(cli, ["plan", "--help"])
    assert f"--{option.replace('_', '-')}" in result.output
