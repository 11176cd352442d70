"""Features in files: SAEs that SAELens saved, and directions."""

from pathlib import Path
from typing import Any

from actstore.errors import JobError


def load_features(sae: str | None, of: str | None) -> Any:
    """What `actstore.analysis` takes as features; None if neither is given.

    Args:
        sae: folder of an SAE.
        of: file with directions [n_features, d], ``.npy`` or ``.safetensors``.

    Raises:
        JobError: both are given, or one holds something else.
        MissingExtraError: SAELens is not installed.
        StorageError: a file cannot be read.
    """
    if sae is not None and of is not None:
        raise JobError("an SAE and a file of directions are given; features can come from one of them")
    if sae is not None:
        from actstore.analysis.sae_lens_objects import load

        return load(Path(sae))
    if of is None:
        return None
    from actstore.analysis.direction_files import read_directions

    return read_directions(of)
