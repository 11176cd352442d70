"""Loading an SAE that SAELens has saved."""

from pathlib import Path
from typing import TYPE_CHECKING

from actstore.errors import JobError
from actstore.integrations.saelens.installed import check_installed
from actstore.reason import reason

if TYPE_CHECKING:
    from sae_lens import SAE


def load_sae(folder: Path | str) -> "SAE":
    """The SAE in a folder that SAELens or `train_sae` wrote, with ``cfg.json`` and ``sae_weights.safetensors``.

    Raises:
        JobError: the folder holds no SAE that SAELens can load.
        MissingExtraError: SAELens is not installed.
    """
    check_installed()
    if not (Path(folder) / "cfg.json").is_file():
        raise JobError(
            f"{folder} holds no cfg.json of an SAE; name the folder that SAELens or actstore train-sae wrote"
        )
    from sae_lens import SAE

    try:
        return SAE.load_from_disk(str(folder))
    except Exception as error:
        raise JobError(f"{folder} holds no SAE that SAELens can load: {reason(error)}") from error
