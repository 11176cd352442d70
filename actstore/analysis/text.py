"""The text of stored tokens: the tokenizer that made them, and what it decodes them to."""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from actstore.errors import TokensError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from actstore.store.committed_store import CommittedStore


def text_of(store: "CommittedStore", sequence: int, position: int | None, window: int) -> str:
    """See `Store.text`."""
    ids = _real_ids(store, sequence)
    if position is not None:
        place = _place(position, len(ids))
        ids = ids[max(0, place - window) : place + window + 1]
    text = tokenizer_of(store).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def str_tokens_of(store: "CommittedStore", sequence: int) -> list[str]:
    """See `Store.str_tokens`."""
    tokenizer = tokenizer_of(store)
    return [tokenizer.decode([token]) for token in _real_ids(store, sequence)]


def _real_ids(store: "CommittedStore", sequence: int) -> list[int]:
    """Token ids of a sequence without its padding."""
    n_sequences = store.shape[0]
    if not -n_sequences <= sequence < n_sequences:
        raise IndexError(
            f"sequence {sequence} is not in {store.url}, which has sequences 0 to {n_sequences - 1}"
        )
    number = sequence % n_sequences
    ids: list[int] = np.asarray(store.tokens[number])[: int(store.lengths[number])].tolist()
    return ids


def _place(position: int, length: int) -> int:
    if not -length <= position < length:
        raise IndexError(f"position {position} is not in the sequence, which has {length} tokens")
    return position % length


def tokenizer_of(store: "CommittedStore") -> "PreTrainedTokenizerBase":
    """The tokenizer that made the tokens of a store, or else that of its model; its hash is compared.

    Raises:
        TokensError: it is unknown or missing, or is not the same any more.
    """
    from actstore.hooks.families.stored_config import UNKNOWN_MODEL

    model = store.plan.request.model
    parts = [run.plan.request.tokens for run in store.runs if run.plan.has_own_tokens]
    hashes = {part.tokenizer_sha256 for part in parts if part.tokenizer_sha256 is not None}
    names = [part.tokenizer for part in parts if part.tokenizer is not None][:1]
    problem = "" if names else "it names no tokenizer"
    # A folder may be relative to another working folder. That of the model is absolute, and the hash decides.
    if model.model_type != UNKNOWN_MODEL and model.name not in names:
        names.append(model.name)
    if len(hashes) > 1:
        names, problem = [], f"its parts were made with {len(hashes)} tokenizers"
    for name in names:
        try:
            return _tokenizer(name, model.revision if name == model.name else None, *hashes)
        except TokensError as error:
            problem += f"{', and ' if problem else ''}{error}"
    raise TokensError(f"{store.url} has tokens without a text: {problem}")


@lru_cache(maxsize=4)
def _tokenizer(name: str, revision: str | None, sha256: str | None = None) -> "PreTrainedTokenizerBase":
    """Load and check a tokenizer once per process. Errors are not cached."""
    from actstore.tokens.tokenizer import load_tokenizer, tokenizer_sha256

    tokenizer = load_tokenizer(name, revision)
    loaded_sha256 = tokenizer_sha256(tokenizer)
    if sha256 not in (None, loaded_sha256):
        raise TokensError(f"the tokenizer {name} has SHA-256 {loaded_sha256}, that of the store had {sha256}")
    return tokenizer
