"""Prompts as the token ids that a forward of each alone would take."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import TokensError
from actstore.extraction.live_model import LiveModel
from actstore.hooks.loading.pretrained import load_tokenizer
from actstore.hooks.text.prompts import Prompts
from actstore.tokens import open_memory

Ids = NDArray[np.int32]


def ids_of(given: Any, model: str, live: LiveModel | None) -> list[Ids]:
    """The real token ids of each prompt, [n_tokens] each, without padding.

    Args:
        given: one text, or prompts in memory as `actstore.tokens.memory.opening.open_memory` takes them.
        model: name or folder of the model, whose tokenizer is loaded if there is text.
        live: the model, if it is in memory.

    Raises:
        TokensError: there are no prompts, one is none or is empty, or there is text and no tokenizer.
    """
    prompts = prompts_of(given)
    to_ids = None
    rows: list[Ids] = []
    for batch in prompts:
        if isinstance(batch[0], str):
            to_ids = to_ids or _text_to_ids(model, live)
            rows += _tokenised(batch, to_ids)
        else:
            rows += batch
    return rows


def prompts_of(given: Any) -> list[list[str] | list[Ids]]:
    """Prompts in memory as texts or as token ids, in batches of one kind.

    Raises:
        TokensError: there are no prompts, or one is none or is empty.
    """
    source = open_memory([given] if isinstance(given, str) else given)
    if source.kind == "chats":
        raise TokensError(
            "tokens are chats, and activations are looked up by token ids; give the ids that "
            "tokenizer.apply_chat_template makes of each"
        )
    batches: Iterator[tuple[int, list[Any]]] = iter(source.batches())
    if source.kind == "text":
        return [list(texts) for _, texts in batches if texts]
    rows = [np.ascontiguousarray(ids, np.int32) for _, batch in batches for ids in batch]
    empty = next((number for number, ids in enumerate(rows) if not len(ids)), None)
    if empty is not None:
        raise TokensError(f"prompt {empty} has no token; give one token id at least")
    return [rows]


def _text_to_ids(model: str, live: LiveModel | None) -> Callable[[Sequence[str]], Any]:
    if live is not None:
        return lambda texts: live.hooked.to_tokens_and_mask(texts, padding_side="right", truncate=False)
    tokenizer = load_tokenizer(model, None)
    if isinstance(tokenizer, str):
        raise TokensError(
            f"tokens are text, and the tokenizer of {model} cannot be loaded ({tokenizer}); give ids"
        )
    return Prompts(tokenizer).to_tokens


def _tokenised(texts: Sequence[str], to_ids: Callable[[Sequence[str]], Any]) -> list[Ids]:
    ids, mask = (tensor.cpu().numpy() for tensor in to_ids(texts))
    return [row[:length].astype(np.int32) for row, length in zip(ids, mask.sum(axis=1), strict=True)]
