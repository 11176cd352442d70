"""Arguments of TransformerLens' ``from_pretrained``: taken where they can be honoured, explained where they cannot."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypedDict

from actstore.errors import ModelError
from actstore.hooks.messages.quoted import quoted

if TYPE_CHECKING:
    import torch

PROCESSING: Final = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
"""What TransformerLens does to weights unless told otherwise."""


class TransformerLensOptions(TypedDict, total=False):
    """Arguments of ``HookedTransformer.from_pretrained`` that have another name here, or one value only."""

    torch_dtype: "str | torch.dtype | None"
    default_prepend_bos: bool | None
    first_n_layers: int | None
    tokenizer: Any
    move_to_device: bool
    n_devices: int | None
    default_padding_side: str | None
    fold_ln: bool | None
    center_writing_weights: bool | None
    center_unembed: bool | None
    fold_value_biases: bool | None
    refactor_factored_attn_matrices: bool | None
    hf_model: Any
    checkpoint_index: int | None
    checkpoint_value: int | None
    checkpoint_label: str | None
    n_ctx: int | None


_OTHER_NAMES: Final = {
    "torch_dtype": "dtype",
    "default_prepend_bos": "prepend_bos",
    "first_n_layers": "n_layers",
}
_REFUSED: Final = {
    "hf_model": "a model that is loaded already is wrapped by HookedModel(hf_model, tokenizer)",
    "checkpoint_index": "checkpoints are revisions: from_pretrained(name, revision='step1000')",
    "checkpoint_value": "checkpoints are revisions: from_pretrained(name, revision='step1000')",
    "checkpoint_label": "checkpoints are revisions: from_pretrained(name, revision='step1000')",
    "n_ctx": "rows may be as long as the model allows, and shorter rows cost less by themselves",
}


def in_own_words(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `HookedModel.from_pretrained`, from these and those that it has anyway.

    Args:
        options: see `TransformerLensOptions`.
        own: the other arguments.

    Raises:
        ModelError: an option asks for what there is not; the message says what to do instead.
        TypeError: there is no such option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    unknown = given.keys() - TransformerLensOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"from_pretrained() got an unexpected keyword argument {min(unknown)!r}")
    check_unprocessed({name: given.get(name) for name in (*PROCESSING, "refactor_factored_attn_matrices")})
    for name, remedy in _REFUSED.items():
        if name in given:
            raise ModelError(f"{name} is not offered: {remedy}; leave it out")
    if given.get("n_devices", 1) != 1:
        raise ModelError(
            f"n_devices is {given['n_devices']}; spread the model with device_map of transformers, and wrap it: "
            "HookedModel(hf_model, tokenizer)"
        )
    side = given.get("default_padding_side", "right")
    if side not in ("left", "right"):
        raise ModelError(f"default_padding_side is {quoted(side)}; choose 'left' or 'right'")
    arguments = dict(own)
    for theirs, ours in _OTHER_NAMES.items():
        if theirs in given:
            if own.get(ours) not in (None, given[theirs]):
                raise ModelError(f"{theirs} and {ours} are the same, and both are given; leave one out")
            arguments[ours] = given[theirs]
    if not given.get("move_to_device", True):
        arguments["device"] = "cpu"
    return arguments


def check_unprocessed(processing: Mapping[str, bool | None]) -> None:
    """Refuse to process weights.

    Raises:
        ModelError: an option is True.
    """
    wanted = [name for name, is_wanted in processing.items() if is_wanted]
    if wanted:
        raise ModelError(
            f"{wanted[0]} is not offered, since weights stay as the model has them; logit_attrs and apply_ln_to_stack "
            "give the numbers of folded weights without it, so leave it out, and see docs/hooks.md#attribution for "
            "code that multiplies by W_U itself"
        )
