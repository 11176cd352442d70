"""How many token ids a model has embeddings for, from its configuration and the head of its checkpoint."""

import json
from pathlib import Path
from typing import Any, Final

from actstore.hooks.families.recognition import architecture

_MAX_HEAD_NBYTES: Final = 100 << 20
"""What the format allows."""


def embedding_rows(config: Any, folder: str) -> int:
    """Rows of the embedding: ``config.vocab_size``, or fewer where the checkpoint in a folder says so.

    A checkpoint that does not say it (of the Hub, not of safetensors, with names of its own) is left to the
    configuration. No weights are read.
    """
    said = int(config.vocab_size)
    family = architecture(config)
    name = f"{family.embed}.weight"
    for path in sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else ():
        for tensor, shape in _shapes(path).items():
            if tensor in (name, f"{family.prefix}.{name}") and len(shape) == 2:
                return min(said, shape[0])
    return said


def _shapes(path: Path) -> dict[str, list[int]]:
    """Of the tensors of a file; empty if it is none. Loading says what is wrong with it."""
    try:
        with path.open("rb") as file:
            nbytes = int.from_bytes(file.read(8), "little")
            if nbytes > min(_MAX_HEAD_NBYTES, path.stat().st_size):
                return {}
            head = json.loads(file.read(nbytes))
        return {name: list(entry["shape"]) for name, entry in head.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
