"""The number of token ids that a model has embeddings for, from its configuration and its checkpoint's header."""

import json
from pathlib import Path
from typing import Any, Final

from actstore.hooks.families.recognition import architecture

_MAX_HEADER_NBYTES: Final = 100 << 20
"""The largest header that safetensors allows."""


def embedding_rows(config: Any, folder: str) -> int:
    """Rows of the embedding: ``config.vocab_size``, or fewer where the checkpoint in the folder has fewer.

    The configuration alone counts for checkpoints on the Hub, in another format than safetensors, or with other names
    of tensors. No weights are read.
    """
    vocab_size = int(config.vocab_size)
    family = architecture(config)
    name = f"{family.embed}.weight"
    for path in sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else ():
        for tensor, shape in _shapes(path).items():
            if tensor in (name, f"{family.prefix}.{name}") and len(shape) == 2:
                return min(vocab_size, shape[0])
    return vocab_size


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor of a safetensors file, by name; empty if the file is damaged, as loading will say."""
    try:
        with path.open("rb") as file:
            nbytes = int.from_bytes(file.read(8), "little")
            if nbytes > min(_MAX_HEADER_NBYTES, path.stat().st_size):
                return {}
            header = json.loads(file.read(nbytes))
        return {name: list(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
