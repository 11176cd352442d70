"""SAEs of SAELens as they are used: those in training are turned into what SAELens would save at its end."""

import contextlib
import copy
import json
import sys
import threading
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from actstore.errors import JobError, MissingExtraError
from actstore.reason import reason

CONFIG: Final = "cfg.json"
"""Name of the file that makes a folder that of an SAE."""
_SCALER: Final = "activation_scaler.json"
_ABOUT_MODELS: Final = r"\s*This SAE has non-empty model_from_pretrained_kwargs"
"""What SAELens warns of whenever it makes an SAE. How to load the model is no question where its values are stored."""
_SCALED: Final = ("expected_average_only_in", "covariance_whitening")
"""Normalisations that SAELens folds into the weights at the end of a training."""
_STATEFUL: Final = ("layer_norm", "constant_norm_rescale")
"""Normalisations of which ``encode`` leaves the numbers in the object, for itself and for ``decode``."""
_TURN: Final = threading.Lock()


def in_turn(sae: Any) -> AbstractContextManager[Any]:
    """What a thread must hold while an SAE encodes rows, and decodes what came of them: one thread at a time, if it
    keeps numbers of the rows. Objects of other libraries, and all other SAEs, hold nothing.
    """
    is_stateful = getattr(getattr(sae, "cfg", None), "normalize_activations", None) in _STATEFUL
    return _TURN if is_stateful else contextlib.nullcontext()


@dataclass(frozen=True)
class _Sent:
    """An SAE of SAELens on its way to another process: what holds local functions cannot be sent."""

    config: dict[str, Any]
    weights: dict[str, Any]


def sent(sae: Any) -> Any:
    """What to send in the place of an SAE; objects of other libraries are sent as they are."""
    sae_lens = sys.modules.get("sae_lens")
    if sae_lens is None or not isinstance(sae, sae_lens.SAE) or isinstance(sae, sae_lens.TrainingSAE):
        return sae
    return _Sent(sae.cfg.to_dict(), sae.state_dict())


def received(sae: Any) -> Any:
    """The SAE of what `sent` gave."""
    if not isinstance(sae, _Sent):
        return sae
    from sae_lens import SAE

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _ABOUT_MODELS)
        made: Any = SAE.from_dict(sae.config)
    made.load_state_dict(sae.weights)
    return made.eval()


def load(folder: Path) -> Any:
    """The SAE in a folder that SAELens or `train_sae` wrote, or in one of their checkpoints.

    Only ``cfg.json`` and safetensors are read, never pickles.

    Raises:
        JobError: the folder holds no SAE that SAELens can load, or its normalisation is unknown.
        MissingExtraError: SAELens is not installed.
    """
    if not (folder / CONFIG).is_file():
        raise JobError(
            f"{folder} holds no {CONFIG} of an SAE; name the folder that SAELens or actstore train-sae wrote"
        )
    try:
        from sae_lens import SAE, TrainingSAE
        from sae_lens.training.activation_scaler import ActivationScaler
    except ImportError as error:
        raise MissingExtraError(
            "loading an SAE needs SAELens, which is not installed; run pip install 'actstore[saelens]'"
        ) from error
    scaler = ActivationScaler()
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        # Only the configuration of a training says how decoders begin.
        is_in_training = "decoder_init_norm" in config
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _ABOUT_MODELS)
            sae: Any = (TrainingSAE if is_in_training else SAE).load_from_disk(str(folder))
        if (folder / _SCALER).exists():
            scaler.load(folder / _SCALER)
    except Exception as error:  # SAELens has no errors of its own
        raise JobError(f"{folder} cannot be loaded as an SAE: {reason(error)}") from error
    if scaler.scaling_factor is None and scaler.whitening is None:
        return inference(sae, str(folder))
    return _folded(sae, scaler, str(folder))


def inference(sae: Any, name: str) -> Any:
    """The SAE that SAELens would save at the end of a training; other objects come back as they are.

    Raises:
        JobError: rows would have to be normalised before, and nothing says how.
    """
    sae_lens = sys.modules.get("sae_lens")
    if sae_lens is None or not isinstance(sae, sae_lens.SAE):
        return sae
    if sae.cfg.normalize_activations in _SCALED:
        raise JobError(
            f"{name} takes rows with the normalisation {sae.cfg.normalize_activations}, and does not have its numbers; "
            "name the folder of its checkpoint, or fold them into it first"
        )
    if not isinstance(sae, sae_lens.TrainingSAE):
        return sae
    weights = {key: value.detach().clone() for key, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _ABOUT_MODELS)
        used = sae_lens.SAE.from_dict(sae.cfg.get_inference_sae_cfg_dict())
    used.process_state_dict_for_loading(weights)
    used.load_state_dict(weights)
    return used.eval()


def _folded(sae: Any, scaler: Any, name: str) -> Any:
    """An SAE that takes rows as they are stored, from one that took them scaled or whitened."""
    sae = copy.deepcopy(sae)
    try:
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if scaler.whitening is not None:
            whitening = scaler.whitening
            sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    except NotImplementedError as error:
        raise JobError(f"{name} is {type(sae).__name__}, whose normalisation cannot be folded") from error
    return inference(sae, name)
