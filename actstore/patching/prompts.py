"""Prompts as token ids of one length."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actstore.errors import PatchError
from actstore.hooks.model import HookedModel
from actstore.hooks.text.inputs import as_token_ids, embeddable, is_array_of_ids

if TYPE_CHECKING:
    import torch


def prompt_ids(model: HookedModel, prompts: Any, which: str) -> "torch.Tensor":
    """Ids [prompt, position] on the device of the model, int64.

    Args:
        model: the model.
        prompts: a text or several, or ids [prompt, position] or [position].
        which: what they are, for errors: ``clean`` or ``corrupted``.

    Raises:
        PatchError: texts have different numbers of tokens.
        TokensError: they are neither text nor ids of this model, or none.
    """
    if are_texts(prompts):
        ids, mask = model.to_tokens_and_mask(prompts)
        lengths = mask.sum(1).tolist()
        if len(set(lengths)) > 1:
            raise PatchError(
                f"the {which} prompts have {min(lengths)} to {max(lengths)} tokens; a position must mean the same in "
                "all prompts of a grid, so choose prompts of one length, or make a grid for each length"
            )
    else:
        ids = as_token_ids(prompts, model.cfg.n_ctx)
    return embeddable(ids.long().to(model.device), None, model.cfg.d_vocab)


def are_prompts(given: Any) -> bool:
    """Whether something is text or token ids, rather than a cache."""
    import torch

    return isinstance(given, torch.Tensor | list | tuple) or is_array_of_ids(given) or are_texts(given)


def are_texts(given: Any) -> bool:
    """Whether something is a text, or texts."""
    if isinstance(given, str):
        return True
    is_sequence = isinstance(given, Sequence) and len(given) > 0
    return is_sequence and all(isinstance(text, str) for text in given)
