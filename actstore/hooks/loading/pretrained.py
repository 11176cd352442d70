"""Loading the configuration, weights and tokenizer of a Hugging Face model, with an error of one sentence."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from actstore.errors import ModelError
from actstore.hooks.families.config_sizes import check_sizes
from actstore.hooks.loading.adapters import refuse_adapter_files
from actstore.hooks.loading.device import usable_device
from actstore.hooks.loading.first_layers import as_own_class, class_with_first_layers
from actstore.hooks.messages.load_errors import explaining, one_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PretrainedConfig":
    """The configuration of a model, without its weights.

    Raises:
        ModelError: there is no such model, there is an adapter beside it, or no model can have its sizes.
    """
    _check_place(name)
    with explaining(name):
        from transformers import AutoConfig, PretrainedConfig

        refuse_adapter_files(name, revision)
        fields, _ = PretrainedConfig.get_config_dict(name, revision=revision)
        check_sizes(fields, f"the configuration of the model {name}", "correct its config.json")
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        return config


def _check_place(name: str) -> None:
    """Refuse a path that is not a folder with files of transformers.

    Raises:
        ModelError: it is a file, a folder with nothing but GGUF weights, or there is nothing.
    """
    gguf = (
        "GGUF, which holds quantised weights in a format of its own; give the model as it was published for "
        "transformers, with config.json and safetensors"
    )
    if os.path.isfile(name):  # noqa: PTH113 - a Hub name is no path
        if name.endswith(".gguf"):
            raise ModelError(f"{name} is {gguf}")
        raise ModelError(f"{name} is a file; give the folder that it is in")
    if not os.path.isdir(name):  # noqa: PTH112
        if name.startswith((".", "/", "~")):
            raise ModelError(
                f"there is no folder {name}; give the folder of a saved model, or its name on the Hub"
            )
        return
    suffixes = {os.path.splitext(file)[1] for file in os.listdir(name)}  # noqa: PTH122, PTH208
    if ".gguf" in suffixes and not suffixes & {".safetensors", ".bin"}:
        raise ModelError(f"all weights in the folder {name} are {gguf}")


def load_model(
    name: str,
    config: "PretrainedConfig",
    *,
    dtype: str | None,
    device: str | None,
    revision: str | None,
    trust_remote_code: bool,
    layers: str,
    n_layers: int | None,
    has_head: bool,
    attention: str | None,
) -> "nn.Module":
    """The model of a configuration, in evaluation mode, without gradients for its parameters.

    Args:
        name: Hub name or folder.
        config: as `load_config` gives it.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None for the one it was saved in.
        device: where to put it, as torch spells it; None for a GPU if there is one.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code that comes with the model.
        layers: path of the list of layers in the model without its head.
        n_layers: load only this many layers; the weights of the others are never read into memory.
        has_head: load the language-model head.
        attention: implementation, such as ``sdpa``; None for the default of the family.

    Raises:
        ModelError: the model cannot be loaded, is damaged, or the device is not there.
    """
    import torch

    if n_layers is not None and not (isinstance(n_layers, int) and 1 <= n_layers <= config.num_hidden_layers):
        raise ModelError(
            f"n_layers is {n_layers!r}; {name} has layers 1 to {config.num_hidden_layers}: choose how many of them"
        )
    device = chosen_device(device)
    usable_device(device)
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"dtype {dtype!r} is not supported; choose float32, bfloat16 or float16")
    given = {} if attention is None else {"attn_implementation": attention}
    is_cut = n_layers is not None and n_layers < config.num_hidden_layers
    with explaining(name), quiet_loading():
        from transformers import AutoModel, AutoModelForCausalLM

        kind: Any = AutoModelForCausalLM if has_head else AutoModel
        if is_cut:
            assert n_layers is not None
            kind = class_with_first_layers(
                kind, config, layers, n_layers, trust_remote_code=trust_remote_code
            )
        model, loaded = kind.from_pretrained(
            name,
            config=config,
            revision=revision,
            dtype="auto" if dtype is None else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **given,
        )
    if is_cut:
        as_own_class(model)
    _check_loaded(name, loaded)
    try:
        model.to(device).eval().requires_grad_(False)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(f"model {name!r} cannot be put on device {device!r}: {one_line(error)}") from error
    result: nn.Module = model
    return result


def chosen_device(device: str | None) -> str:
    """The given device; for None a GPU, if torch finds one, else the CPU."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(name: str, revision: str | None, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, which pads on the right; if there is none, the reason as text."""
    from transformers import AutoTokenizer

    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # noqa: BLE001 - the Rust tokenizers raise bare Exception
        return one_line(error)
    # Given only a config.json, transformers makes an empty tokenizer that turns any text into nothing.
    has_words = not set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab())
    if not has_words:
        return "its folder lacks the files of a tokenizer"
    # Some are saved to pad on the left, for generation; there the first token would be at another position in each row.
    tokenizer.padding_side = "right"
    return tokenizer


def _check_loaded(name: str, loaded: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights: transformers fills them with new random numbers each time.

    Raises:
        ModelError: weights are missing.
    """
    lacking = sorted(str(key) for key in [*loaded["missing_keys"], *loaded["mismatched_keys"]])
    if lacking:
        raise ModelError(
            f"the checkpoint of {name} lacks {len(lacking)} weights that the model needs, such as {lacking[0]}; it is "
            "damaged, or not of this architecture"
        )


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers while it loads. Without later layers, it would warn about each unused weight."""
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
