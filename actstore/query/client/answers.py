"""Checks that the documents of a server can be what the client asked for."""

import math
from itertools import pairwise
from typing import Final

import numpy as np

from actstore.analysis.search import Matches
from actstore.query.client.bounds import SEGMENTS, shown, unexpected
from actstore.query.documents import MatchList, PromptList, RunDocument, StatisticsDocument, StoreDocument
from actstore.store.format.plan import FIRST_RUN, HookArray
from actstore.store.records.run import Run, contradictions
from actstore.store.records.segment_ranges import SegmentRanges

_STATISTICS_NBYTES: Final = 4 << 20
"""Bytes of a document of statistics without what grows with the hook."""
_MEAN_NBYTES: Final = 40
"""Bytes for each element of the mean as text, and for its sum."""
_MOMENT_NBYTES: Final = 11
"""Bytes that eight bytes take in base64, rounded up."""


def runs_of(document: StoreDocument, url: str) -> tuple[Run, ...]:
    """The runs of a store.

    Args:
        document: description of the store.
        url: URL of the store.

    Raises:
        StorageError: there can be no such runs.
    """
    names = [run.plan.run for run in document.runs]
    if not names or names[0] != FIRST_RUN or any(a >= b for a, b in pairwise(names)):
        raise unexpected(url, f"the runs {shown(names)}", f"run {FIRST_RUN} and later ones, in order,")
    if len(document.contents) != len(names):
        raise unexpected(url, f"the contents of {len(document.contents)} runs", f"those of {len(names)}")
    runs = tuple(_run(run, url) for run in document.runs)
    for name, problem in contradictions({run.plan.run: run.plan for run in runs}).items():
        raise unexpected(url, f"run {name}, which {shown(problem)},", "what can be")
    return runs


def _run(document: RunDocument, url: str) -> Run:
    plan, finished = document.plan, document.finished
    try:
        committed = SegmentRanges(document.committed, plan.n_segments)
    except ValueError as error:
        raise unexpected(url, f"run {plan.run} with {error}", "its committed segments") from error
    is_complete = len(committed) == plan.n_segments
    if not is_complete and len(committed) > SEGMENTS:
        raise unexpected(url, f"run {plan.run} with {len(committed)} segments", f"at most {SEGMENTS}")
    if finished is not None and (finished.plan != plan or not is_complete):
        raise unexpected(url, f"run {plan.run}, finished with another plan or not complete,", "its own plan")
    return Run(
        plan=plan,
        committed=range(plan.n_segments) if is_complete else committed,
        has_tokens=document.has_tokens,
        finished=finished,
    )


def statistics_nbytes(shape: tuple[int, ...]) -> int:
    """Bytes that a document of statistics of a hook of this shape has at most."""
    n_elements = math.prod(shape)
    moment = _MOMENT_NBYTES * n_elements * (n_elements + 1) // 2
    return _STATISTICS_NBYTES + _MEAN_NBYTES * n_elements + moment


def check_statistics(document: StatisticsDocument, hook: HookArray, where: str) -> None:
    """See that statistics are those of a hook.

    Raises:
        StorageError: the statistics are of another hook, or impossible.
    """
    if (document.hook, document.shape) != (hook.name, hook.shape):
        came = shown(f"statistics of {document.hook} of shape {document.shape}")
        raise unexpected(where, came, f"those of {hook.name} of shape {hook.shape}")
    document.record.check(hook.shape, f"{where}, as the server gives it,")


def matches_of(document: MatchList, shape: tuple[int, int], limit: int, where: str, *, once: bool) -> Matches:
    """The places at which a text begins, once they are checked.

    Args:
        document: reply of the server.
        shape: sequences and positions of the store.
        limit: places that were asked for at most.
        where: URL of the request, for the error.
        once: whether each sequence is there once at most.

    Raises:
        StorageError: there are no such places.
    """
    if len(document.sequences) != len(document.positions) or len(document.sequences) > limit:
        came = f"{len(document.sequences)} sequences and {len(document.positions)} positions"
        raise unexpected(where, came, f"as many of each, and at most {limit},")
    try:
        matches = Matches(np.array(document.sequences, np.int64), np.array(document.positions, np.int64))
    except OverflowError as error:
        raise unexpected(where, "numbers beyond 64 bits", "places of the store") from error
    for numbers, size in zip(matches, shape, strict=True):
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < size):
            raise unexpected(where, f"{numbers.min()} to {numbers.max()}", f"0 to {size - 1}")
    steps, later = np.diff(matches.sequences), np.diff(matches.positions) > 0
    if not ((steps > 0) | ((steps == 0) & later & (not once))).all():
        raise unexpected(where, "places twice or out of order", "each once, in the order of the store,")
    return matches


def check_prompts(found: PromptList, n_prompts: int, shape: tuple[int, int], where: str) -> None:
    """Check that a server says where each of some prompts is.

    Raises:
        StorageError: it does not.
    """
    n_sequences, width = shape
    is_right = len(found.lengths) == n_prompts and all(0 < length <= width for length in found.lengths)
    for place in found.places:
        is_right = is_right and len(place.sequences) == n_prompts and len(place.hooks) > 0
        is_right = is_right and all(0 <= row < n_sequences for row in place.sequences)
    if not is_right or not found.places:
        raise unexpected(
            where, "places that are none in the store", f"the place of each of {n_prompts} prompts"
        )
