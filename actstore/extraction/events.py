"""What a run reports while it goes on. The library prints nothing; it calls back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from actstore.store.records.commit import CommitRecord
from actstore.store.statistics.not_finite import NotFinite


@dataclass(frozen=True)
class Tokenised:
    """Some more text has been tokenised and packed."""

    n_sequences: int
    """So far."""
    n_tokens: int
    """So far, padding included."""


@dataclass(frozen=True)
class SegmentDone:
    """One more segment is committed."""

    segment: int
    n_sequences: int
    nbytes: int
    """Written for it; 0 if another worker had committed it before."""
    seconds_forward: float
    """In the model."""
    seconds_waiting: float
    """The model stood still before this segment: storage was slower, or tokens were not there."""
    seconds_writing: float
    """From the end of the forward to the commit; overlaps the forward of later segments."""
    is_new: bool = True
    """False if another run had committed it before we came to it; nothing was computed."""
    n_retries: int = 0
    """Requests to storage that were repeated since the last segment of this worker."""
    not_finite: Mapping[str, NotFinite] = field(default_factory=dict)
    """By hook that has them: tokens with NaN or infinity, as the model computed them."""
    record: CommitRecord | None = None
    """To be committed by whoever hears of it, where storage cannot decide between several workers."""


Event = Tokenised | SegmentDone
OnEvent = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """For callers that want no events."""
