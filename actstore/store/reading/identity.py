"""What tells the contents of a store from all others: its plans and the checksums of its shards, not where it lies."""

import hashlib
from collections.abc import Iterable, Sequence

from actstore.errors import StoreReplacedError
from actstore.store.records.run import Run

Identity = tuple[str, ...]
"""Of each run, in order: 16 hexadecimal digits of its plan, then ``-`` and the checksum of the table of its shards if
it is finished, ``~`` and some of the tag of its plan otherwise.
"""


def identity_of(runs: Iterable[Run]) -> Identity:
    """Of some runs of a store. It is the same for a copy of the store, once its runs are finished."""
    return tuple(_of(run) for run in runs)


def label_of(identity: Identity) -> str:
    """A few characters, however many runs there are: how many, ``-``, and a hash over all of them."""
    return f"{len(identity)}-{hashlib.sha256(','.join(identity).encode()).hexdigest()[:32]}"


def contents_of(runs: Iterable[Run]) -> list[str]:
    """Likewise, of runs whose segments are all committed, whether they are finished or only about to be, and wherever
    they lie. To be compared with `is_same_contents`.
    """
    return [each.partition("~")[0] for each in identity_of(runs)]


def is_same_contents(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether two can be of the same contents."""
    return len(left) == len(right) and all(map(_can_be_same, left, right))


def _can_be_same(left: str, right: str) -> bool:
    (plan, _, checksum), (other_plan, _, other_checksum) = left.partition("-"), right.partition("-")
    return plan == other_plan and (not checksum or not other_checksum or checksum == other_checksum)


def _of(run: Run) -> str:
    plan = hashlib.sha256(run.plan.to_bytes()).hexdigest()[:16]
    if run.finished is not None:
        return f"{plan}-{run.finished.shards.crc32c:08x}"
    tag = run.plan_tag
    return f"{plan}~" + ("" if tag is None else hashlib.sha256(tag.encode()).hexdigest()[:8])


def continues(earlier: Identity, later: Identity) -> bool:
    """Whether a store can be another one, grown or not: all runs of it are there, and what was finished is the same."""
    return len(earlier) <= len(later) and all(map(_is_same, earlier, later))


def check_same(url: str, earlier: Identity, later: Identity) -> None:
    """See that a store is the one that was opened before, grown or not.

    Raises:
        StoreReplacedError: it is another one.
    """
    if not continues(earlier, later):
        raise replaced(url)


def replaced(url: str) -> StoreReplacedError:
    """What to say where another store is at a URL."""
    return StoreReplacedError(
        f"{url} is not the store that was opened any more: it was replaced, removed or repaired since; open it again"
    )


def _is_same(earlier: str, later: str) -> bool:
    if earlier == later:
        return True
    plan, _, tag = earlier.partition("~")
    now, _, tag_now = later.partition("~")
    # What was not finished may be by now, and its plan lies at another place in a copy.
    return "-" not in plan and (later.startswith(f"{plan}-") or (plan == now and not (tag and tag_now)))
