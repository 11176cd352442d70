"""Aligning two stores of one text whose tokenizers differ: tokens that end at the same character of a document."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.search import BLOCK_NBYTES
from actstore.analysis.text import tokenizer_of
from actstore.errors import LoaderError
from actstore.store.records.run import runs_with_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from actstore.store.committed_store import CommittedStore

_DOCUMENTS: Final = 256
"""Documents that are tokenised together."""
_LAST_TOKENS: Final = 4
"""Tokens at the end of a cut document that may hold parts of one character."""


@dataclass(frozen=True)
class Alignment:
    """Which tokens of two stores end at the same character of the same document."""

    masks: tuple[NDArray[np.bool_], NDArray[np.bool_]]
    """Where a token of each store has a partner in the other, [n_sequences, context_length]. Both masks have equally
    many tokens, in the same order: the i-th of one belongs to the i-th of the other.
    """
    n_aligned: int
    """Number of pairs of tokens."""
    n_documents: int
    """Number of documents of which both stores have tokens."""
    n_left_out: int
    """How many of these documents have no pair, since they cannot be told to be the same text: their tokens do not
    decode to a text that gives these tokens again, or the texts differ.
    """


@dataclass(frozen=True)
class _Document:
    """The tokens that a store has of a document."""

    key: tuple[int, int]
    """Part of the store, and number of the document in it."""
    ids: NDArray[np.int32]
    rows: NDArray[np.int64]
    """Sequence times context_length plus position of each token."""
    is_whole: bool
    """Whether these are the first tokens of the document, without a gap."""


def align(first: "CommittedStore", other: "CommittedStore") -> Alignment:
    """Find the tokens of two stores that end at the same character. All token ids of both are read and decoded.

    Tokens that packing put in have no partner. Where several tokens end at one character, since they are parts of its
    bytes, the last of them counts.

    Raises:
        LoaderError: the documents of a store are not in the order of the source, or no tokens can be aligned.
        NotCommittedError: the tokens of a run are not complete.
        StorageError: the tokens cannot be read.
        TokensError: a tokenizer is missing, or is not the one that made the tokens.
    """
    stores = (first, other)
    for store in stores:
        if store.positions is not None:
            raise LoaderError(
                f"{store.url} has only chosen positions; align stores of all positions (extract without --positions)"
            )
    tokenizers = [_fast(store) for store in stores]
    masks = tuple(np.zeros(store.shape, bool) for store in stores)
    flat = [mask.reshape(-1) for mask in masks]
    n_documents = n_left_out = 0
    pairs = _both(_documents(first), _documents(other))
    while batch := list(islice(pairs, _DOCUMENTS)):
        n_documents += len(batch)
        texts = [
            _texts([pair[which] for pair in batch], tokenizer) for which, tokenizer in enumerate(tokenizers)
        ]
        for documents, ours, theirs in zip(batch, *texts, strict=True):
            if ours is None or theirs is None or not _is_same_text(ours[0], theirs[0]):
                n_left_out += 1
                continue
            at = _common_ends(ours[1], theirs[1])
            for which, document in enumerate(documents):
                flat[which][document.rows[at[which]]] = True
    n_aligned = int(masks[0].sum())
    if not n_aligned:
        raise LoaderError(
            f"{first.url} and {other.url} cannot be aligned by characters: of {n_documents} documents with the same "
            f"number, {n_left_out} have another text or tokens that give no text; extract both from one source"
        )
    return Alignment((masks[0], masks[1]), n_aligned, n_documents, n_left_out)


def _fast(store: "CommittedStore") -> "PreTrainedTokenizerBase":
    tokenizer = tokenizer_of(store)
    if not tokenizer.is_fast:
        raise LoaderError(
            f"the tokenizer of {store.url} cannot tell the characters of its tokens; only those with a tokenizer.json "
            "can, so extract with that"
        )
    return tokenizer


def _documents(store: "CommittedStore") -> Iterator[_Document]:
    """The documents of a store, in order."""
    length = store.shape[1]
    step = max(1, BLOCK_NBYTES // (16 * length))
    first = 0
    for number, part in enumerate(runs_with_tokens(store.runs)):
        stop = first + part.plan.n_sequences
        left: tuple[NDArray[Any], ...] = tuple(np.empty(0, np.int64) for _ in range(4))
        while first < stop:
            end = min(first + step, stop)
            documents = store.documents[first:end].reshape(-1)
            real = np.flatnonzero(documents >= 0)
            ids, offsets = (values[first:end].reshape(-1)[real] for values in (store.tokens, store.offsets))
            read = (documents[real], ids, offsets, real + first * length)
            joined = tuple(np.concatenate(arrays) for arrays in zip(left, read, strict=True))
            if (np.diff(joined[0]) < 0).any():
                raise LoaderError(
                    f"the sequences of {store.url} are not in the order of their source, so that documents have to be "
                    "put together from everywhere; extract without a seed to align it"
                )
            starts = np.flatnonzero(np.diff(joined[0], prepend=-1))
            # The last document may go on in the next block.
            whole, left = starts, tuple(values[:0] for values in joined)
            if end < stop and len(starts):
                whole, left = starts[:-1], tuple(values[starts[-1] :] for values in joined)
            yield from _cut(number, joined, whole, len(joined[0]) - len(left[0]))
            first = end


def _cut(
    part: int, arrays: tuple[NDArray[Any], ...], starts: NDArray[np.int64], end: int
) -> Iterator[_Document]:
    documents, ids, offsets, rows = arrays
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), end], strict=True):
        span = slice(start, stop)
        is_whole = bool((offsets[span] == np.arange(stop - start)).all())
        yield _Document((part, int(documents[start])), ids[span].astype(np.int32), rows[span], is_whole)


def _both(ours: Iterator[_Document], theirs: Iterator[_Document]) -> Iterator[tuple[_Document, _Document]]:
    """The documents that both have."""
    left, right = next(ours, None), next(theirs, None)
    while left is not None and right is not None:
        if left.key == right.key:
            yield left, right
            left, right = next(ours, None), next(theirs, None)
        elif left.key < right.key:
            left = next(ours, None)
        else:
            right = next(theirs, None)


def _texts(
    documents: list[_Document], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[str, NDArray[np.int64]] | None]:
    """The text of each document, and the character at which each of its tokens ends. None where the tokens do not
    decode to a text that gives the same tokens.
    """
    decoded = [_decode(tokenizer, document.ids) for document in documents]
    encoded = tokenizer(
        decoded,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    texts: list[tuple[str, NDArray[np.int64]] | None] = []
    for document, text, ids, offsets in zip(
        documents, decoded, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        # A cut can go through a character; its first bytes do not decode to anything.
        n_same = _n_same(document.ids, np.array(ids, np.int64))
        is_same = document.is_whole and n_same and n_same >= len(document.ids) - _LAST_TOKENS
        ends = np.array([end for _, end in offsets[:n_same]], np.int64)
        texts.append((text[: ends[-1]], ends) if is_same else None)
    return texts


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: NDArray[np.int32]) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _n_same(ids: NDArray[np.int32], again: NDArray[np.int64]) -> int:
    """Number of first ids that are equal."""
    n = min(len(ids), len(again))
    different = np.flatnonzero(ids[:n] != again[:n])
    return int(different[0]) if len(different) else n


def _is_same_text(ours: str, theirs: str) -> bool:
    """Whether one is the beginning of the other: ``max_tokens`` cuts the last document."""
    return ours.startswith(theirs) or theirs.startswith(ours)


def _common_ends(
    ours: NDArray[np.int64], theirs: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the last token that ends at each common end."""
    common = np.intersect1d(ours, theirs)
    return np.searchsorted(ours, common, "right") - 1, np.searchsorted(theirs, common, "right") - 1
