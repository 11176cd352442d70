"""PEFT adapters: refused among the files of a model, and unwrapped around a loaded model."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import ModelError
from actstore.reason import reason

if TYPE_CHECKING:
    import torch

_LENGTH: Final = 8


def refuse_adapter_files(name: str, revision: str | None) -> None:
    """Refuse an adapter among the files of a model.

    transformers puts it onto the weights if `peft` can be imported, and ignores it otherwise: one folder, two models.

    Args:
        name: Hub name or folder.
        revision: branch, tag or commit on the Hub.

    Raises:
        ModelError: there is an adapter.
    """
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(name, revision=revision) is None:
        return
    cure = (
        "load model and adapter with peft, call merge_and_unload() and save_pretrained(), and give the folder that "
        "this makes"
    )
    if not os.path.isdir(name):  # noqa: PTH112 - a Hub name is no path
        raise ModelError(f"{name} on the Hub holds an adapter (adapter_config.json); {cure}")
    if not (Path(name) / "config.json").exists():
        raise ModelError(f"the folder {name} holds an adapter (adapter_config.json) and no model; {cure}")
    raise ModelError(
        f"the folder {name} holds an adapter (adapter_config.json) beside the model, and whether transformers applies "
        f"it depends on what is installed; {cure}, or take the adapter away"
    )


def inside(model: Any) -> Any:
    """The model of transformers that a PeftModel runs; any other model is returned as it is.

    Raises:
        ModelError: the PeftModel changes more than modules of that model.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    for adapter, config in model.peft_config.items():
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ModelError(
                f"the adapter {adapter!r} of this PeftModel ({kind}) depends on more than the tokens of a position: "
                "it adds virtual tokens, or looks for others; only adapters of modules, such as LoRA, can be hooked"
            )
    return model.get_base_model()


def check_inside(model: Any, inner: Any, device: "torch.device") -> None:
    """Check that a PeftModel computes the same as the model in it, on which the hooks are.

    Args:
        model: the PeftModel.
        inner: what `inside` gives for it.
        device: device of its token ids.

    Raises:
        ModelError: their outputs are not equal, bit for bit.
    """
    import torch

    tokens = torch.arange(_LENGTH, device=device)[None]

    def output(module: Any) -> "torch.Tensor":
        result: torch.Tensor = module(input_ids=tokens, use_cache=False)[0]
        return result

    try:
        with torch.no_grad():
            is_same = torch.equal(output(model), output(inner))
    except Exception as error:
        text = reason(error)
        raise ModelError(f"this PeftModel cannot be run on token ids alone: {text}") from error
    if not is_same:
        raise ModelError(
            "this PeftModel gives another output than the model in it, so it does more than change modules and cannot "
            "be hooked; merge_and_unload() it if its adapter can be merged"
        )
