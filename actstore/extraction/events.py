"""Events that a run reports while it goes on. The library prints nothing; it calls back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from actstore.store.records.commit import CommitRecord
from actstore.store.statistics.not_finite import NotFinite


@dataclass(frozen=True)
class Tokenised:
    """Some more text has been tokenised and packed."""

    n_sequences: int
    """Number of sequences so far."""
    n_tokens: int
    """Number of tokens so far, without padding."""
    n_truncated: int = 0
    """Number of documents so far that were cut."""


@dataclass(frozen=True)
class SegmentDone:
    """One more segment is committed."""

    segment: int
    n_sequences: int
    nbytes: int
    """Bytes written for the segment; 0 if another worker had committed it before."""
    seconds_forward: float
    """Time in the model."""
    seconds_waiting: float
    """Time that the model waited before this segment for storage or tokens."""
    seconds_writing: float
    """Time from the end of the forward to the commit, which overlaps the forward of later segments."""
    n_tokens: int = 0
    """Number of tokens in the segment, without padding; 0 if another worker had committed it before."""
    n_rows: int = 0
    """Number of rows of each hook that were stored: chosen positions, or all tokens."""
    is_new: bool = True
    """Whether this worker computed the segment; False if another process had committed it before."""
    n_retries: int = 0
    """Number of requests to storage that were repeated since the last segment of this worker."""
    not_finite: Mapping[str, NotFinite] = field(default_factory=dict)
    """Tokens with NaN or infinity, for each hook that has any, as the model computed them."""
    record: CommitRecord | None = None
    """The record, which the receiver of this event must commit where storage cannot decide between several workers."""


Event = Tokenised | SegmentDone
OnEvent = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """Ignore an event; the callback of callers that want none."""
