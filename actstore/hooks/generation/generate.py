"""Hugging Face's generation with functions on hooks at every step."""

import contextlib
import copy
from typing import TYPE_CHECKING, Any

from actstore.hooks.capture.forward import Forward
from actstore.hooks.generation.choosing import Choosing
from actstore.hooks.generation.steps import Steps

if TYPE_CHECKING:
    import torch


def generated(
    model: Any,
    forward: Forward,
    steps: Steps,
    *,
    ids: "torch.Tensor",
    mask: "torch.Tensor",
    choosing: Choosing,
    tokenizer: Any,
    use_cache: bool,
    has_logits: bool,
    has_values: bool,
) -> tuple[Any, dict[str, "torch.Tensor"]]:
    """Generate tokens after a prompt.

    Args:
        model: the model of transformers, with its head.
        forward: shows what passes the modules of that model.
        steps: sees the values of each step [batch, position of the step, ...], and may change them. The first step is
            the whole prompt, each later one a single token; without a cache every step has all positions so far.
        ids: the prompt [batch, position].
        mask: [batch, position], 0 at padding, which is on the left.
        choosing: how tokens are chosen.
        tokenizer: what texts that end a row are found with; None if there are none.
        use_cache: keep keys and values from step to step.
        has_logits: whether the logits of each step are kept.
        has_values: whether ``steps`` keeps values, which are then joined to those of all positions of the result.

    Returns:
        (Hugging Face's output, with ``sequences``: ids of prompt and new tokens [batch, position]; values [batch,
        position, ...] by hook). At positions after the end of a row, values mean nothing.
    """
    import torch
    from transformers import DynamicCache, GenerationConfig

    given: dict[str, Any] = {}
    if use_cache:
        # Without the configuration, so that layers with a window keep all keys, and patterns show all positions.
        given["past_key_values"] = DynamicCache()
    # A model brings settings of its own, such as sampling or suppressed tokens, which apply where none are given. A
    # shallow copy without them has the same modules, and leaves the model as it is in other threads.
    alone = copy.copy(model)
    alone.generation_config = GenerationConfig()
    with torch.no_grad(), forward.watched(steps, steps.names, batch=len(ids)):
        # Steps without a cache have all positions so far, and the last forward has all of them at once.
        with contextlib.nullcontext() if use_cache else steps.not_kept():
            output = alone.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=choosing.config(use_cache=use_cache),
                logits_processor=choosing.processors(mask),
                output_logits=has_logits,
                tokenizer=tokenizer,
                **given,
            )
        output.past_key_values = None
        if has_values:
            # The last token was chosen and never given to the model.
            result = output.sequences
            mask = torch.cat([mask, mask.new_ones(len(ids), result.shape[1] - ids.shape[1])], dim=1)
            n_new = 1 if use_cache else result.shape[1]
            forward.call(result[:, -n_new:], mask, given.get("past_key_values"))
    return output, steps.joined()
