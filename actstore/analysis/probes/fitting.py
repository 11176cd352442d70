"""Fitting probes: which rows, in what memory, solved how, and measured."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.probes.metrics import Resampled
from actstore.analysis.probes.planning import groups_of
from actstore.analysis.probes.probe import Kind, Probe
from actstore.analysis.probes.results import Probes
from actstore.analysis.probes.rows.labels import Labels, labels_of
from actstore.analysis.probes.rows.passes import Targets
from actstore.analysis.probes.rows.sources import Addresses
from actstore.analysis.probes.rows.splits import HELD_OUT, split_of
from actstore.analysis.probes.solving import Asked, Outcome, solve_group
from actstore.analysis.scanning.chosen_rows import ChosenRows
from actstore.analysis.scanning.scan import ScanOptions, scan
from actstore.errors import JobError
from actstore.store.statistics.moments import has_statistics

if TYPE_CHECKING:
    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

PENALTIES: Final = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
CURVE: Final = (0.1, 0.25, 0.5)
_BLOCK: Final = 1 << 22
"""Entries that are looked at together."""


def fit_probe(
    store: "CommittedStore",
    hook: "HookName | Sequence[HookName]",
    labels: Any,
    kind: Kind = "logistic",
    *,
    l2: float | Iterable[float] = PENALTIES,
    held_out: float = 0.2,
    groups: Any = None,
    seed: int = 0,
    standardise: bool = True,
    curve: Sequence[float] = CURVE,
    n_bootstrap: int = 1000,
    memory: int | None = None,
    on_hooks: Callable[[int, int], None] | None = None,
    **options: Unpack[ScanOptions],
) -> Probes:
    """Fit a linear probe for each of some hooks, and measure it on documents that were held out.

    What is minimised, over rows that are standardised with the mean and deviation of all training rows, is the mean
    loss plus half of ``l2`` times the squared weights; the bias is free. So `LogisticRegression` of scikit-learn with
    ``C=1 / (l2 * n)``, and `Ridge` with ``alpha=l2 * n``, over n training rows give the same.

    Args:
        store: the store.
        hook: a stored hook, a glob such as ``blocks.*.hook_resid_post``, or several of these. Each gets a probe.
        labels: what to predict: an array by sequence, [n_sequences]; by token, [n_sequences, width], with NaN, None or
            -1 where there is no label; or the name of a kept column.
        kind: ``logistic`` for two classes, ``multinomial`` for any number of them, ``ridge`` for numbers, or
            ``mean_difference``, which has no penalty and is not standardised.
        l2: penalties, of which the one with the lowest loss on the held-out documents is taken.
        held_out: share of the documents of each class that is held out. All rows of a document are on one side.
        groups: what stays on one side instead of documents: an array [n_sequences], or the name of a kept column.
        seed: decides which documents are held out, and the resamples of the intervals.
        standardise: False leaves rows as they are stored.
        curve: fractions of the training documents for which the learning curve is computed; empty for none.
        n_bootstrap: how often the held-out documents are resampled for the intervals.
        memory: bytes that rows and sums may take. None takes half of what is free. It does not change any bit.
        on_hooks: called with the number of hooks that are done, and of all.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        HookError: a hook is not stored.
        JobError: labels, or another argument, are not valid; or there are too few documents.
        TokensError: the store does not keep a column.
        ActstoreError: see `scan`.
    """
    started = time.perf_counter()
    penalties = _checked(kind, l2, n_bootstrap, memory)
    hooks = _hooks(store, hook)
    found = labels_of(store, labels, groups, are_classes=kind != "ridge")
    found, n_unlabelled, n_not_finite = _restricted(store, hooks, found, options)
    if kind in ("logistic", "mean_difference") and len(found.classes) != 2:
        raise JobError(
            f"labels have {len(found.classes)} classes, and kind: {kind} tells two apart; choose kind: multinomial"
        )
    split = split_of(found, held_out, seed, curve)
    targets = Targets(found, split)
    asked = Asked(kind, penalties, standardise, seed)
    here = np.flatnonzero(split.parts == HELD_OUT)
    resampled = Resampled.of(found.groups[here], n_bootstrap, seed)
    n_train = int((split.parts >= 0).sum())
    narrowed = _narrowed(options, found, store.shape[1])
    n_reads = n_done = 0

    def on_hook() -> None:
        nonlocal n_done
        n_done += 1
        if on_hooks is not None:
            on_hooks(n_done, len(hooks))

    by_hook: dict[str, Outcome] = {}
    for group in groups_of(store, hooks, kind, len(penalties), targets, memory):
        found_here, n_scans = solve_group(store, group, targets, asked, resampled, narrowed, on_hook)
        by_hook |= dict(zip(group.hooks, found_here, strict=True))
        n_reads += n_scans
    outcomes = [by_hook[name] for name in hooks]
    baseline, baseline_class = None, None
    if found.classes:
        most = int(np.bincount(found.values[split.parts >= 0]).argmax())
        baseline = float((found.values[here] == most).mean())
        baseline_class = found.classes[most]
    return Probes(
        probes=tuple(
            _probe(store, name, kind, found.classes, one) for name, one in zip(hooks, outcomes, strict=True)
        ),
        kind=kind,
        classes=found.classes,
        n_rows=(n_train, len(here)),
        n_documents=(split.n_documents[-1], split.n_held_out),
        baseline=baseline,
        baseline_class=baseline_class,
        n_unlabelled=n_unlabelled,
        n_not_finite=n_not_finite,
        is_training=(split.parts >= 0).reshape(store.shape),
        is_held_out=(split.parts == HELD_OUT).reshape(store.shape),
        n_passes=max(one.n_passes for one in outcomes),
        n_reads=n_reads,
        seconds=time.perf_counter() - started,
    )


def _checked(kind: str, l2: Any, n_bootstrap: int, memory: int | None) -> NDArray[np.float64]:
    """The penalties, ascending.

    Raises:
        JobError: an argument is not valid.
    """
    if kind not in get_args(Kind):
        raise JobError(f"kind is {kind!r}; it can be {', '.join(get_args(Kind))}")
    penalties = np.unique(np.atleast_1d(np.asarray(l2, np.float64)))
    if not len(penalties) or not np.isfinite(penalties).all() or penalties[0] <= 0:
        raise JobError(f"l2 is {l2!r}; give numbers above 0")
    if n_bootstrap < 0:
        raise JobError(f"n_bootstrap is {n_bootstrap}; it must be 0 or more")
    if memory is not None and memory <= 0:
        raise JobError(f"memory is {memory}; give a number of bytes above 0")
    return penalties


def _hooks(store: "CommittedStore", hook: Any) -> tuple[str, ...]:
    """Names of the hooks, each once, in model order.

    Raises:
        HookError: one is not stored.
        JobError: one has no value for a token alone.
    """
    patterns = hook if isinstance(hook, list) else [hook]
    chosen = {name for pattern in patterns for name in store.matching(pattern)}
    if not chosen:
        raise JobError("no hook is given; name one, several, or a glob")
    for name in sorted(chosen):
        if not has_statistics(store.array_of(name)):
            raise JobError(
                f"{name} has values of pairs of tokens, which no probe of tokens takes; choose another hook"
            )
    return tuple(name for name in store.hooks if name in chosen)


def _restricted(
    store: "CommittedStore", hooks: tuple[str, ...], labels: Labels, options: ScanOptions
) -> tuple[Labels, int, int]:
    """The labels of the rows that the options choose and that are finite in all hooks; how many of the chosen rows have
    no label, and how many have one and are not finite.

    Which rows are not finite must not depend on which hooks are read together.

    Raises:
        JobError: no labelled row is left.
    """
    rows = ChosenRows.of(store, options.get("drop", ()), options.get("seqpos"), options.get("sequences"))
    n_sequences, width = store.shape
    is_there = labels.is_labelled.copy()
    n_unlabelled = 0
    step = max(1, _BLOCK // width)
    for start in range(0, n_sequences, step):
        some = slice(start, min(start + step, n_sequences))
        taken = rows.taken(store, some).reshape(-1)
        here = is_there[start * width : some.stop * width]
        n_unlabelled += int((taken & ~here).sum())
        here &= taken
    if any(store.not_finite(name) for name in hooks):
        finite = np.zeros(len(is_there), bool)
        finite[scan(store, {"finite": Addresses(hooks)}, **options).results["finite"]] = True
        n_not_finite = int((is_there & ~finite).sum())
        is_there &= finite
    else:
        n_not_finite = 0
    if not is_there.any():
        raise JobError("no labelled row is left; drop fewer of them, or label other rows")
    return labels.only(is_there), n_unlabelled, n_not_finite


def _narrowed(options: ScanOptions, labels: Labels, width: int) -> ScanOptions:
    """The options of a scan of the labelled rows: sequences without any are not read."""
    narrowed = options.copy()
    narrowed.pop("drop", None)
    narrowed.pop("seqpos", None)
    narrowed["sequences"] = labels.is_labelled.reshape(-1, width).any(axis=1)
    return narrowed


def _probe(store: "CommittedStore", hook: str, kind: Kind, classes: tuple[Any, ...], one: Outcome) -> Probe:
    return Probe(
        hook=hook,
        kind=kind,
        weights=one.weights,
        bias=one.bias,
        shape=tuple(store.array_of(hook).shape),
        classes=classes,
        l2=one.l2,
        metrics=one.metrics,
        by_l2=one.by_l2,
        curve=one.curve,
        is_converged=one.is_converged,
    )
