"""What tells the contents of a store from all others: its plans and the checksums of its shards, not where it lies."""

import hashlib
from collections.abc import Iterable, Sequence

from actstore.errors import StoreReplacedError
from actstore.store.format.plan import Plan
from actstore.store.format.remembered import remembered
from actstore.store.records.run import Run

Identity = tuple[str, ...]
"""One string for each run, in order: 16 hexadecimal digits of a hash of its plan, then ``-`` and the checksum of the
table of its shards if it is finished, ``~`` and digits of a hash of its plan's tag otherwise.
"""


def identity_of(runs: Iterable[Run]) -> Identity:
    """The identity of some runs of a store. A copy of the store has the same, once its runs are finished."""
    return tuple(_identity_of_run(run) for run in runs)


def label_of(identity: Identity) -> str:
    """A short label of an identity: the number of its runs, ``-``, and a hash over all of them."""
    return f"{len(identity)}-{hashlib.sha256(','.join(identity).encode()).hexdigest()[:32]}"


def contents_of(runs: Iterable[Run]) -> list[str]:
    """What tells the contents of runs whose segments are all committed, finished or not yet, wherever they are stored.
    `is_same_contents` compares two of these lists.
    """
    return [identity.partition("~")[0] for identity in identity_of(runs)]


def is_same_contents(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether two lists from `contents_of` can be of the same contents."""
    return len(left) == len(right) and all(map(_can_be_same, left, right))


def _can_be_same(left: str, right: str) -> bool:
    (plan, _, checksum), (other_plan, _, other_checksum) = left.partition("-"), right.partition("-")
    return plan == other_plan and (not checksum or not other_checksum or checksum == other_checksum)


@remembered
def _hash_of(plan: Plan) -> str:
    return hashlib.sha256(plan.to_bytes()).hexdigest()[:16]


def _identity_of_run(run: Run) -> str:
    plan = _hash_of(run.plan)
    if run.finished is not None:
        return f"{plan}-{run.finished.shards.crc32c:08x}"
    tag = run.plan_tag
    return f"{plan}~" + ("" if tag is None else hashlib.sha256(tag.encode()).hexdigest()[:8])


def continues(earlier: Identity, later: Identity) -> bool:
    """Whether ``later`` can be the store of ``earlier``, grown or not: it has all runs, and the same finished ones."""
    return len(earlier) <= len(later) and all(map(_is_same, earlier, later))


def check_same(url: str, earlier: Identity, later: Identity) -> None:
    """Check that a store is the one that was opened before, grown or not.

    Raises:
        StoreReplacedError: it is another store.
    """
    if not continues(earlier, later):
        raise replaced(url)


def replaced(url: str) -> StoreReplacedError:
    """The error for a URL with another store than the one that was opened."""
    return StoreReplacedError(
        f"{url} is not the store that was opened any more: it was replaced, removed or repaired since; open it again"
    )


def _is_same(earlier: str, later: str) -> bool:
    if earlier == later:
        return True
    plan, _, tag = earlier.partition("~")
    now, _, tag_now = later.partition("~")
    # An unfinished run may have been finished since, and in a copy its plan has another tag.
    return "-" not in plan and (later.startswith(f"{plan}-") or (plan == now and not (tag and tag_now)))
