"""Loading models of Hugging Face: configuration, weights, device; one sentence where that fails."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from actstore.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PretrainedConfig":
    """The configuration of a model, without its weights.

    Raises:
        ModelError: there is no such model.
    """
    from transformers import AutoConfig

    if os.path.isfile(name):  # noqa: PTH113 - a Hub name is no path
        raise ModelError(f"{name} is a file; give the folder that it is in")
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):  # noqa: PTH112
        raise ModelError(
            f"there is no folder {name}; give the folder of a saved model, or its name on the Hub"
        )
    with _explaining(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        return config


def load_model(
    name: str,
    config: "PretrainedConfig",
    *,
    dtype: str | None,
    device: str | None,
    revision: str | None,
    trust_remote_code: bool,
    n_layers: int | None,
    has_head: bool,
    attention: str | None,
) -> "nn.Module":
    """The model of a configuration, in evaluation mode, without gradients for its parameters.

    Args:
        name: Hub name or folder.
        config: as `load_config` gives it; changed if ``n_layers`` is given.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None for the one it was saved in.
        device: where to put it, as torch spells it; None for a GPU if there is one.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code that comes with the model.
        n_layers: load only this many layers; the weights of the others are never read into memory.
        has_head: load the language-model head.
        attention: implementation, such as ``sdpa``; None for the default of the family.

    Raises:
        ModelError: not loadable, damaged, or the device is not there.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    if n_layers is not None:
        if not 1 <= n_layers <= config.num_hidden_layers:
            raise ModelError(f"n_layers is {n_layers}; {name} has layers 1 to {config.num_hidden_layers}")
        _truncate(config, n_layers)
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"dtype {dtype!r} is not supported; choose float32, bfloat16 or float16")
    kind: Any = AutoModelForCausalLM if has_head else AutoModel
    given = {} if attention is None else {"attn_implementation": attention}
    with _explaining(name), _quiet_loading():
        model, loaded = kind.from_pretrained(
            name,
            config=config,
            revision=revision,
            dtype="auto" if dtype is None else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **given,
        )
    _check_loaded(name, loaded)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"model {name!r} cannot be put on device {device!r}: {first}") from error
    found: nn.Module = model
    return found


def load_tokenizer(name: str, revision: str | None, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that comes with a model; the reason as text, if there is none."""
    from transformers import AutoTokenizer

    try:
        with _quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # noqa: BLE001 - the Rust tokenizers raise bare Exception
        return " ".join(str(error).split()) or type(error).__name__
    # Given only a config.json, transformers makes an empty tokenizer that turns any text into nothing.
    has_words = not set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab())
    return tokenizer if has_words else "its folder lacks the files of a tokenizer"


def _truncate(config: Any, n_layers: int) -> None:
    config.num_hidden_layers = n_layers
    for field in ("layer_types", "attention_layers"):
        if getattr(config, field, None):
            setattr(config, field, getattr(config, field)[:n_layers])


def _check_loaded(name: str, loaded: dict[str, Any]) -> None:
    """transformers fills weights that a checkpoint lacks with random numbers, other ones each time.

    Raises:
        ModelError: there are such weights.
    """
    lacking = sorted(str(key) for key in [*loaded["missing_keys"], *loaded["mismatched_keys"]])
    if lacking:
        raise ModelError(
            f"the checkpoint of {name} lacks {len(lacking)} weights that the model needs, such as {lacking[0]}; it is "
            "damaged, or not of this architecture"
        )


@contextlib.contextmanager
def _explaining(name: str) -> Iterator[None]:
    """One sentence in place of what the Hub client raises."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if os.path.isdir(name):  # noqa: PTH112 - a Hub name is no path
            raise ModelError(
                f"the folder {name} does not hold a model that transformers can load: {error}"
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        offline = " (HF_HUB_OFFLINE is set, so only folders and cached models can be used)"
        raise ModelError(
            f"model {name!r} is neither a folder nor a model on the Hugging Face Hub that can be reached: {first}"
            + (offline if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True") else "")
        ) from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """A truncated model leaves weights unused on purpose; transformers would warn about each of them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    had_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bar:
            logging.enable_progress_bar()
