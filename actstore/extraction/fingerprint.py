"""Fingerprints of model weights, so that no store is ever continued with other weights."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from actstore.errors import ModelError
from actstore.hooks.loading.pretrained import load_config
from actstore.store.format.shard import crc32c

_WEIGHTS: Final = ("*.safetensors", "*.bin", "*.gguf", "config.json")
_INDEXES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD: Final = re.compile(r".+-\d{5}-of-\d{5}\.(safetensors|bin)")


def fingerprint(name: str, revision: str | None) -> str:
    """The fingerprint of a model: ``crc32c:`` of config and weight files, or ``hub:`` and the commit for a Hub name.

    Other files that decide which values transformers loads from the folder are added, with name and content; an
    ordinary folder has none. Adapters and code in the folder are refused when a model is loaded.

    Raises:
        ModelError: the folder holds no weights, or there is no such model.
    """
    if not os.path.isdir(name):  # noqa: PTH112 - a Hub name is no path
        commit = getattr(load_config(name, revision=revision), "_commit_hash", None)
        if commit is None:
            raise ModelError(
                f"the commit of model {name!r} on the Hub is not known; download the model to a folder"
            )
        return f"hub:{commit}"
    folder = Path(name)
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    others = sorted(set(_others(folder)) - set(files))
    if not any(path.suffix != ".json" for path in (*files, *others)):
        raise ModelError(f"the folder {name} holds no weights (*.safetensors or *.bin)")
    crc = 0
    for path in files:
        crc = _with_file(path, crc)
    for path in others:
        relative = os.path.relpath(path, folder).encode()
        crc = _with_file(path, crc32c(np.frombuffer(relative, np.uint8), crc))
    return f"crc32c:{crc:08x}"


def _with_file(path: Path, crc: int) -> int:
    return crc32c(np.memmap(path, dtype=np.uint8, mode="r"), crc) if path.stat().st_size else crc


def _others(folder: Path) -> Iterator[Path]:
    """Files that transformers reads for a model although they have unusual names."""
    config = _read(folder / "config.json")
    named = config.get("configuration_files")
    for name in named if isinstance(named, list) else ():
        yield from _existing(folder, name)
    weights = config.get("transformers_weights")
    yield from _existing(folder, weights)
    indexes = [*_INDEXES, *([weights] if isinstance(weights, str) and weights.endswith(".json") else [])]
    for name in indexes:
        yield from _of_index(folder, name)


def _of_index(folder: Path, name: str) -> Iterator[Path]:
    """An index and the files that it names, unless these are exactly the numbered shards beside it."""
    index = _read(folder / name)
    mapped = index.get("weight_map")
    names = {file for file in mapped.values() if isinstance(file, str)} if isinstance(mapped, dict) else set()
    suffix = ".bin" if ".bin." in name else ".safetensors"
    shards = {path.name for path in folder.glob(f"*{suffix}") if _SHARD.fullmatch(path.name)}
    if not names or names == shards:
        return
    yield from _existing(folder, name)
    for file in names:
        yield from _existing(folder, file)


def _existing(folder: Path, name: Any) -> Iterator[Path]:
    if isinstance(name, str) and (folder / name).is_file():
        yield folder / name


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none, in which case loading the model says what is wrong."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
