"""Prompts in batches of equal lengths, so that nothing is padded."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from actstore.errors import PatchError
from actstore.hooks.model import HookedModel
from actstore.hooks.text.inputs import is_array_of_ids

if TYPE_CHECKING:
    import torch

TOKENS_AT_ONCE: Final = 4096
"""Tokens of a batch unless told otherwise; at least one row."""


def batches(
    model: HookedModel,
    prompts: "torch.Tensor | str | Sequence[str]",
    max_tokens: int | None = None,
) -> "Iterator[torch.Tensor]":
    """Ids [row, position] on the device of the model, of prompts of each length that occurs.

    Args:
        model: the model.
        prompts: ids [prompt, position] or [position]; or text, whose prompts may differ in length.
        max_tokens: tokens of a batch, at least one row; None for 4,096.

    Raises:
        PatchError: there is no token.
    """
    import torch

    if is_array_of_ids(prompts):
        prompts = torch.as_tensor(prompts)
    if isinstance(prompts, torch.Tensor):
        by_length = [prompts[None] if prompts.ndim == 1 else prompts]
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows: dict[int, list[torch.Tensor]] = {}
        for text in texts:
            ids = model.to_tokens(text)
            rows.setdefault(ids.shape[1], []).append(ids)
        by_length = [torch.cat(its_rows) for its_rows in rows.values()]
    if not any(ids.numel() for ids in by_length):
        raise PatchError("there are no tokens; give at least one prompt with one token")
    for ids in by_length:
        n_rows = max(1, (max_tokens or TOKENS_AT_ONCE) // max(1, ids.shape[1]))
        for first in range(0, len(ids) if ids.numel() else 0, n_rows):
            yield ids[first : first + n_rows].to(model.device)
