"""The fingerprint of a model folder: the files it covers, and its value for ordinary folders, which must stay."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from transformers import AutoModelForCausalLM

from actstore.errors import ModelError
from actstore.extraction.fingerprint import fingerprint

TinyModel = Callable[..., Path]
Change = Callable[[Path], None]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same model in three numbered shards and an index."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    return folder


def plain(folder: Path) -> str:
    """The value in all stores so far: the checksum of config and weights, one after another."""
    names = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    crc = 0
    for path in [folder / "config.json", *names]:
        crc = google_crc32c.extend(crc, path.read_bytes())
    return f"crc32c:{crc:08x}"


def test_an_ordinary_folder_keeps_the_value_that_stores_have(folder: Path) -> None:
    assert fingerprint(str(folder), None) == plain(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "README.md").write_text("words")
    assert fingerprint(str(folder), None) == plain(folder)


def test_so_does_a_folder_of_shards(sharded: Path) -> None:
    assert fingerprint(str(sharded), None) == plain(sharded)
    shutil.copy(sharded / INDEX, sharded / "other.json")
    # Mistral's own format, which transformers does not read.
    (sharded / "consolidated.safetensors").write_bytes(b"1234")
    assert fingerprint(str(sharded), None) == plain(sharded)


def into_a_subfolder(folder: Path) -> None:
    """All shards are in a folder below, as the index says."""
    index = json.loads((folder / INDEX).read_text())
    (folder / "deep").mkdir()
    for path in folder.glob("model-*.safetensors"):
        path.rename(folder / "deep" / path.name)
    index["weight_map"] = {key: f"deep/{file}" for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def named_by_the_config(folder: Path) -> None:
    into_a_subfolder(folder)
    (folder / INDEX).rename(folder / "deep" / INDEX)
    set_field(folder, "transformers_weights", f"deep/{INDEX}")


def other_config(folder: Path) -> None:
    """A config that another file replaces for some versions of transformers."""
    shutil.copy(folder / "config.json", folder / "config.4.0.0.json")
    set_field(folder, "configuration_files", ["config.4.0.0.json"])


def set_field(folder: Path, name: str, value: Any, file: str = "config.json") -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {name: value}))


def damage(pattern: str) -> Change:
    """Change one weight."""

    def change(folder: Path) -> None:
        (path,) = folder.glob(pattern)
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)

    return change


def swap_files(folder: Path) -> None:
    """Let the index leave out the last shard."""
    index = json.loads((folder / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if file != names[-1]}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("prepare", "change"),
    [
        pytest.param(None, damage("model-00002-*"), id="a shard"),
        pytest.param(None, swap_files, id="which files the index names"),
        pytest.param(into_a_subfolder, damage("deep/model-00002-*"), id="a shard in a subfolder"),
        pytest.param(named_by_the_config, damage("deep/model-00002-*"), id="weights that the config names"),
        pytest.param(
            other_config,
            lambda folder: set_field(folder, "rms_norm_eps", 0.5, "config.4.0.0.json"),
            id="a config for this version",
        ),
        pytest.param(
            None,
            lambda folder: set_field(folder, "quantization_config", {"quant_method": "fp8"}),
            id="quantisation",
        ),
        pytest.param(None, lambda folder: set_field(folder, "rms_norm_eps", 0.5), id="config"),
    ],
)
def test_everything_that_decides_values_is_in_it(
    sharded: Path, prepare: Change | None, change: Change
) -> None:
    if prepare is not None:
        prepare(sharded)
        model = AutoModelForCausalLM.from_pretrained(sharded)  # transformers does read it
        assert model.config.num_hidden_layers == 3
    before = fingerprint(str(sharded), None)
    assert before == fingerprint(str(sharded), None)
    change(sharded)
    assert fingerprint(str(sharded), None) != before


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', "[" * 100_000]
)
def test_an_index_that_is_none_is_left_to_loading(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    assert fingerprint(str(folder), None) == plain(folder)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        fingerprint(str(folder), None)
