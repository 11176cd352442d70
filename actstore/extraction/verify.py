"""`actstore.verify`: checking a store against its own records, and on request against the model."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ModelError, StorageError
from actstore.extraction.computing.worker import WorkerSpec, check_weights, load_planned_model
from actstore.extraction.live_model import LiveModel
from actstore.extraction.value_checks.deep import DeepCheck, deep_check
from actstore.extraction.value_checks.golden import sampled_row
from actstore.extraction.value_checks.older_versions import doubt
from actstore.extraction.value_checks.reference import Kind, Reference, whole_model
from actstore.hooks.loading.pretrained import chosen_device
from actstore.hooks.model import HookedModel
from actstore.storage.blobs import Blobs
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import FIRST_RUN, Plan
from actstore.store.locking.turns import repairing
from actstore.store.reading.rows import Rows, Section
from actstore.store.reading.segment_tokens import TokenReader
from actstore.store.records.commit import commit_key, plan_key, read_commit
from actstore.store.verifying.findings import Finding, Verification
from actstore.store.verifying.repair import repair as remove_damage
from actstore.store.verifying.verify import Check


def verify(
    url: str,
    *,
    deep: bool = False,
    repair: bool = False,
    n_rows: int = 16,
    model: str | HookedModel | None = None,
    revision: str | None = None,
    device: str | None = None,
    on_object: Callable[[int], None] = lambda _nbytes: None,
) -> Verification:
    """Read everything that is committed, and compare it with the records about it.

    Args:
        url: URL of the store.
        deep: also run the model again on some sequences of each run whose tokens are in the store.
        repair: write damaged parts again that follow from the rest of the store, and remove the others, so that the
            next extraction computes exactly those again. This is refused while somebody writes to the store.
        n_rows: number of sequences of each run to run again.
        model: path of the model on this machine, if it has changed, or the model itself; its weights must be those of
            the plan.
        revision: branch, tag or commit on the Hub.
        device: device to run the model on.
        on_object: called with the size of each object that was read.

    Raises:
        BusyError: somebody writes to the store, which cannot be repaired meanwhile.
        StorageError: there is no store, or storage cannot be reached.
        ModelError: the model cannot be loaded, or has other weights than the plan; or, with ``deep``, is not known.
    """
    started = time.perf_counter()
    live = LiveModel(model).hooked if isinstance(model, HookedModel) else None
    folder = None if isinstance(model, HookedModel) else model
    blobs = open_blobs(str(url))
    check = Check(blobs, on_object)
    with contextlib.ExitStack() as stack:
        # The turn begins before the check: shards that are written during it would seem to have no record.
        is_turn = repair and bool(blobs.names("_actstore"))
        turn = stack.enter_context(repairing(blobs)) if is_turn else None
        check.run()
        _check_possible(blobs, check, deep=deep)
        findings = [*check.findings, *_doubts(blobs, check)]
        n_recomputed = 0
        kinds: set[Kind] = set()
        if deep and not any(finding.severity == "damage" for finding in findings):
            for plan in check.plans.values():
                token_check = check.tokens.get(plan.tokens_of)
                if token_check is None or not token_check.is_sound:
                    continue  # the model has no tokens to run on
                sizes = token_check.sizes
                assert sizes is not None  # they are sound
                rows = _sampled_rows(plan, check.committed[plan.run], n_rows, sizes.counts)
                spec = WorkerSpec(
                    blobs.url,
                    folder or plan.request.model.name,
                    revision or plan.request.model.revision,
                    device,
                    live=live,
                )
                wrong, kind = _recompute(blobs, plan, rows, spec)
                findings += wrong
                kinds.add(kind)
                n_recomputed += len(rows)
        changed = [] if turn is None else remove_damage(blobs, check, findings, turn.check)
    n_rewritten = sum(blobs.head(key) is not None for key in changed)
    return Verification(
        url=blobs.url,
        is_complete=check.is_complete,
        incomplete=tuple(_incomplete(check)),
        n_segments=sum(plan.n_segments for plan in check.plans.values()),
        n_committed=sum(len(done) for done in check.committed.values()),
        n_objects=check.n_objects,
        nbytes=check.nbytes,
        n_rows_recomputed=n_recomputed,
        reference=min(kinds, default=None),
        findings=tuple(findings),
        n_removed=len(changed) - n_rewritten,
        n_rewritten=n_rewritten,
        seconds=time.perf_counter() - started,
    )


def _doubts(blobs: Blobs, check: Check) -> Iterator[Finding]:
    """Findings about runs whose values an older version may have computed wrongly."""
    for name, plan in check.plans.items():
        if 0 not in check.vouched[name]:
            continue  # the version that made it is not known
        reason = doubt(plan, read_commit(blobs, plan, 0))
        if reason is not None:
            yield Finding(commit_key(name, 0), reason, run=name, segment=0, severity="warning")


def _check_possible(blobs: Blobs, check: Check, *, deep: bool) -> None:
    """Check that there is a store, and that the deep check is possible if it was asked for.

    Raises:
        StorageError: there is no store.
        ModelError: the model of the store is not known.
    """
    if not check.plans and not check.findings:
        raise StorageError(
            f"there is no actstore store at {blobs.url} ({plan_key(FIRST_RUN)} does not exist)"
        )
    if deep and any(plan.request.model.is_imported for plan in check.plans.values()):
        raise ModelError(
            f"the activations at {blobs.url} were imported, and which weights computed them is not known; verify "
            "without deep"
        )


def _incomplete(check: Check) -> Iterator[str]:
    for name, plan in check.plans.items():
        n_done = len(check.committed[name])
        if n_done < plan.n_segments:
            tokens = plan.request.tokens
            most = "" if tokens.max_tokens is None else f" with max_tokens {tokens.max_tokens}"
            yield (
                f"run {name} ({plan.hook_listing} over {tokens.source}{most}) has {n_done} of "
                f"{plan.n_segments} segments"
            )


def _sampled_rows(plan: Plan, committed: Sequence[int], n_rows: int, counts: NDArray[Any]) -> list[int]:
    """Rows with something to compare, spread over all committed segments; the same at every call.

    Args:
        plan: plan of the run.
        committed: numbers of its committed segments.
        n_rows: number of rows, if there are so many.
        counts: entries in use of each row of the plan, [n_sequences].
    """
    segments = [plan.segment(index) for index in sorted(committed)]
    segments = [segment for segment in segments if counts[segment.start : segment.stop].any()]
    if not segments:
        return []
    chosen = np.unique(np.linspace(0, len(segments) - 1, n_rows).round().astype(int))
    segments = [segments[index] for index in chosen]
    rows = {
        sampled_row(plan.tokens_sha256, segment, counts[segment.start : segment.stop]) for segment in segments
    }
    in_use = [segment.start + np.flatnonzero(counts[segment.start : segment.stop]) for segment in segments]
    rng = np.random.default_rng(0)
    while len(rows) < min(n_rows, sum(map(len, in_use))):
        candidates = in_use[int(rng.integers(len(in_use)))]
        rows.add(int(candidates[int(rng.integers(len(candidates)))]))
    return sorted(rows)


def _whole(plan: Plan, spec: WorkerSpec) -> Reference | None:
    """The whole model, loaded by transformers alone; None if memory is short, or the model is in memory already."""
    import torch

    if spec.live is not None:
        return None  # no file has its weights
    check_weights(plan, spec)
    dtype: torch.dtype = getattr(torch, plan.request.dtype)
    batch = (plan.request.batch_size, plan.context_length)
    device = torch.device(chosen_device(spec.device))
    return whole_model(spec.model, spec.revision, dtype, device, batch)


def _recompute(blobs: Blobs, plan: Plan, rows: list[int], spec: WorkerSpec) -> tuple[list[Finding], Kind]:
    """Compute rows again.

    Returns:
        (findings for values that differ, kind of model that they were compared with)
    """
    import torch

    arrays = {
        hook.name: Rows(blobs, [Section(plan.activations(hook), lambda _: True)])
        for hook in plan.request.hooks
    }

    def compare(reference: Reference) -> DeepCheck:
        return deep_check(
            reference,
            plan,
            rows,
            tokens=TokenReader(blobs, plan),
            stored=lambda hook, some: arrays[hook][some],
        )

    kind: Kind = "whole"
    whole = _whole(plan, spec)
    try:
        checked = None if whole is None else compare(whole)
    except torch.OutOfMemoryError:  # there was memory for the model, but not for its forward
        checked = None
    if checked is None:
        whole = None  # frees memory for the other model
        kind, checked = "loaded", compare(Reference(load_planned_model(plan, spec), "loaded"))
    layouts = {hook.name: plan.activations(hook) for hook in plan.request.hooks}
    findings = [
        Finding(
            layouts[problem.hook].key(problem.sequence // plan.segment_size),
            f"is not what the model computes: {problem}",
            run=plan.run,
            segment=problem.sequence // plan.segment_size,
        )
        for problem in checked.problems
    ]
    return findings, kind
