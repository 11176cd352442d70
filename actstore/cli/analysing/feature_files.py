"""Features in files: SAEs that SAELens saved, and directions."""

from pathlib import Path
from typing import Any

from actstore.errors import JobError
from actstore.reason import reason


def load_features(sae: str | None, of: str | None) -> Any:
    """What `actstore.analysis` takes as features; None if neither is given.

    Args:
        sae: folder of an SAE.
        of: file with directions [n_features, d], ``.npy`` or ``.safetensors``.

    Raises:
        JobError: both are given, or one cannot be read.
        MissingExtraError: SAELens is not installed.
    """
    if sae is not None and of is not None:
        raise JobError("an SAE and a file of directions are given; features can come from one of them")
    if sae is not None:
        return _sae(sae)
    return None if of is None else _directions(Path(of))


def _sae(folder: str) -> Any:
    from actstore.integrations.saelens.installed import check_installed

    check_installed()
    if not (Path(folder) / "cfg.json").is_file():
        raise JobError(
            f"{folder} holds no SAE: there is no cfg.json; give the folder that SAELens saved it to"
        )
    from sae_lens import SAE

    try:
        return SAE.load_from_disk(folder, device="cpu")
    except Exception as error:
        raise JobError(f"the SAE in {folder} cannot be read: {reason(error)}") from error


def _directions(path: Path) -> Any:
    """The directions in a file: the only array in it."""
    import numpy as np

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
            if len(tensors) != 1:
                raise JobError(f"{path} holds {len(tensors)} tensors; give a file with one, [n_features, d]")
            return next(iter(tensors.values())).float()
        return np.load(path, allow_pickle=False)
    except JobError:
        raise
    except Exception as error:
        raise JobError(f"the directions in {path} cannot be read: {reason(error)}") from error
