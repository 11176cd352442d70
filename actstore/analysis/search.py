"""Finding stored sequences by a text, by token ids, or by the hash of all their tokens."""

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.text import tokenizer_of
from actstore.errors import JobError, TokensError
from actstore.store.showing.html_table import html_table

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

BLOCK_NBYTES: Final = 1 << 24
"""Bytes of tokens that are looked at together."""
_HEX: Final = frozenset("0123456789abcdefABCDEF")
_SHOWN: Final = 8
"""Places that are shown."""
_SAMPLE: Final = 1 << 14
"""Number of tokens of a block that are sampled to find the rarest id of a needle."""

Ids = NDArray[np.int32]


class Matches(NamedTuple):
    """Places of matches, in the order of the store, without repeats."""

    sequences: NDArray[np.int64]
    """Numbers of the sequences, [n_matches]."""
    positions: NDArray[np.int64]
    """Positions in these sequences, [n_matches]."""

    def __repr__(self) -> str:
        shown = [f"{s}:{p}" for s, p in zip(self.sequences[:_SHOWN], self.positions[:_SHOWN], strict=True)]
        more = ["..."] if len(self.sequences) > _SHOWN else []
        n = len(self.sequences)
        return f"<Matches: {n:,} place{'' if n == 1 else 's'}, sequence:position {', '.join(shown + more) or 'none'}>"

    def _repr_html_(self) -> str:
        """The same for notebooks, as a table."""
        places = zip(self.sequences[:_SHOWN].tolist(), self.positions[:_SHOWN].tolist(), strict=True)
        rows = [(f"{sequence:,}", f"{position:,}") for sequence, position in places]
        return f"<p>{len(self.sequences):,} places</p>" + html_table(("sequence", "position"), rows)


def sequence_sha256(tokens: Any) -> str:
    """Hex SHA-256 of the ids of a sequence [n_tokens], without padding, as little-endian int32.

    Raises:
        JobError: these are no token ids.
    """
    return hashlib.sha256(_ids(tokens).astype("<i4").tobytes()).hexdigest()


def check(text: Any, tokens: Any, sha: Any, limit: int | None) -> None:
    """Check the arguments of a search.

    Raises:
        JobError: not exactly one of text, tokens and sha is given, it is not valid, or the limit is below 1.
        TokensError: the text is no valid text.
    """
    given = [name for name, value in (("text", text), ("tokens", tokens), ("sha", sha)) if value is not None]
    if len(given) != 1:
        what = " and ".join(given) or "nothing"
        raise JobError(f"the search is for {what}; give one of text, tokens and sha")
    if limit is not None and limit < 1:
        raise JobError(f"limit is {limit}; it must be 1 or more, or None for all matches")
    if tokens is not None and not len(_ids(tokens)):
        raise JobError("tokens is empty, which is everywhere; give one token id at least")
    if sha is not None and not (isinstance(sha, str) and len(sha) == 64 and set(sha) <= _HEX):
        raise JobError(f"sha is {sha!r}; it must be 64 hex digits, as sequence_sha256 gives them")
    if text is not None and (not isinstance(text, str) or text.encode(errors="ignore").decode() != text):
        raise TokensError(f"text is {text!r}; it must be a str of valid Unicode")


def search(
    store: "CommittedStore",
    text: str | None,
    tokens: Any,
    sha: Any,
    prefix: bool,
    limit: int | None,
    once: bool,
    look: Callable[[int], None] | None = None,
) -> Matches:
    """See `Store.find` and `Store.locate`; ``once`` gives only the first match of each sequence. ``look`` is called
    with the number of sequences of each block, and may raise an error to stop.
    """
    check(text, tokens, sha, limit)
    if sha is not None:
        blocks = _with_sha(store, sha, look)
    else:
        needles = [_ids(tokens)] if text is None else _encoded(store, text)
        blocks = _with_ids(store, needles, prefix, look)
    kept, n_kept = [Matches(np.empty(0, np.int64), np.empty(0, np.int64))], 0
    for sequences, positions in blocks:
        selected = _is_new(sequences) if once else slice(None)
        kept.append(Matches(sequences[selected], positions[selected]))
        n_kept += len(kept[-1].sequences)
        if limit is not None and n_kept >= limit:
            break
    return Matches(*(np.concatenate(values)[:limit] for values in zip(*kept, strict=True)))


def _with_ids(
    store: "CommittedStore", needles: list[Ids], is_prefix: bool, look: Callable[[int], None] | None
) -> Iterator[Matches]:
    length, lengths = store.tokens.shape[1], store.lengths
    needles = [needle for needle in needles if len(needle) <= length]
    for first, block in _read(store, look) if needles else ():
        candidates = [(needle, _starts(block, needle, is_prefix)) for needle in needles]
        if not any(len(starts) for _, starts in candidates):
            continue
        real = lengths[first : first + len(block)]
        places = []
        for needle, starts in candidates:
            rows = starts // length
            # This also leaves out matches that continue in the next sequence.
            places.append(starts[starts - rows * length + len(needle) <= real[rows]])
        at = places[0]
        if len(places) > 1:
            at = np.sort(np.concatenate(places), kind="stable")  # a stable sort merges ascending parts
            at = at[_is_new(at)]
        rows = at // length
        matches = Matches(rows + first, at - rows * length)
        yield _behind_inserted(store, matches) if is_prefix else matches


def _with_sha(store: "CommittedStore", sha: Any, look: Callable[[int], None] | None) -> Iterator[Matches]:
    digest, lengths, sha256 = bytes.fromhex(sha), store.lengths, hashlib.sha256
    for first, block in _read(store, look):
        ends = (lengths[first : first + len(block)] * 4).tolist()
        rows = zip(block.view(np.uint8), ends, strict=True)
        same = first + np.flatnonzero([sha256(row[:end]).digest() == digest for row, end in rows])
        yield Matches(same, np.zeros_like(same))


def _read(store: "CommittedStore", look: Callable[[int], None] | None) -> Iterator[tuple[int, Ids]]:
    """Yield the first row and the token ids [n_rows, length] of each block; they are valid until the next block."""
    (n_sequences, length), rows = store.tokens.shape, store.tokens
    step = min(max(1, BLOCK_NBYTES // (4 * length)), n_sequences)
    # Reading into reused memory is much faster than into new memory.
    memory = np.empty((step, length), rows.storage)
    for first in range(0, n_sequences, step):
        yield first, rows.read(slice(first, first + step), memory[: n_sequences - first])
        if look is not None:
            look(min(step, n_sequences - first))


def _starts(block: Ids, needle: Ids, is_prefix: bool) -> NDArray[np.int64]:
    """Places in the block where these ids are consecutive, ascending; a match may continue in the next row."""
    ids, length, rarest = block.reshape(-1), block.shape[1], -1
    if is_prefix:
        starts = (np.arange(0, ids.size, length)[:, None] + np.arange(min(2, length))).reshape(-1)
    else:
        sample = np.sort(ids[:_SAMPLE])
        counts = sample.searchsorted(needle, "right") - sample.searchsorted(needle, "left")
        rarest = int(counts.argmin())
        starts = np.flatnonzero(ids == needle[rarest]) - rarest
    starts = starts[(starts >= 0) & (starts <= ids.size - len(needle))]
    for at, token in enumerate(needle):
        if at != rarest:
            starts = starts[ids[starts + at] == token]
    return starts


def _is_new(ascending: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True where a value differs from the one before, [n]."""
    return np.concatenate((np.ones(min(1, len(ascending)), bool), ascending[1:] != ascending[:-1]))


def _behind_inserted(store: "CommittedStore", matches: Matches) -> Matches:
    """Matches at position 0, and matches at position 1 behind a token that packing inserted."""
    sequences, positions = matches
    keep = positions == 0
    second = np.flatnonzero(~keep)
    keep[second] = store.documents[sequences[second], 0] == -1
    return Matches(sequences[keep], positions[keep])


def _ids(tokens: Any) -> Ids:
    try:
        ids = np.asarray(tokens)
    except ValueError:  # lists of different lengths
        ids = np.empty((), object)
    if ids.shape == (0,):
        return np.empty(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.astype(np.int32) != ids).any():
        raise JobError(f"tokens is {str(tokens)[:80]}; it must be a list of token ids, each within int32")
    return ids.astype(np.int32)


def _encoded(store: "CommittedStore", text: str) -> list[Ids]:
    """Ids of a text without and with a leading space; only once if the tokenizer adds the space itself."""
    from actstore.tokens.tokenizer import encode_documents

    texts = [text] if text[:1].isspace() else [text, f" {text}"]
    try:
        tokenizer = tokenizer_of(store)
    except TokensError as error:
        raise TokensError(f"{error}; give tokens instead of text") from error
    needles = encode_documents(tokenizer, texts)
    if not len(needles[0]):
        raise TokensError(f"text is {text!r}, and the tokenizer makes no tokens of it; give a longer text")
    return list({needle.tobytes(): needle for needle in needles if len(needle)}.values())
