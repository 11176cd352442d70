"""Which weights a model name stands for, so that no store is ever continued with others."""

import os
from pathlib import Path

import numpy as np

from actstore.errors import ModelError
from actstore.hooks.loading import load_config
from actstore.store.shard import crc32c

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "config.json")


def fingerprint(name: str, revision: str | None) -> str:
    """``crc32c:`` over config and weight files of a folder; ``hub:`` and the commit for a Hub name.

    Raises:
        ModelError: the folder holds no weights, or there is no such model.
    """
    if not os.path.isdir(name):  # noqa: PTH112 - a Hub name is no path
        commit = getattr(load_config(name, revision=revision), "_commit_hash", None)
        if commit is None:
            raise ModelError(
                f"the commit of model {name!r} on the Hub cannot be told; download it to a folder"
            )
        return f"hub:{commit}"
    files = sorted(path for pattern in _WEIGHTS for path in Path(name).glob(pattern))
    if not any(path.suffix != ".json" for path in files):
        raise ModelError(f"the folder {name} holds no weights (*.safetensors or *.bin)")
    crc = 0
    for path in files:
        if path.stat().st_size:
            crc = crc32c(np.memmap(path, dtype=np.uint8, mode="r"), crc)
    return f"crc32c:{crc:08x}"
