"""`evaluate_sae`: figures of any number of SAEs, in one pass over a store."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from actstore.analysis.sae_evaluation.figures import figures_of
from actstore.analysis.sae_evaluation.held_out import ByDocument, ByMask, HeldOut
from actstore.analysis.sae_evaluation.result import SaeEvaluation
from actstore.analysis.sae_evaluation.saes import saes_of
from actstore.analysis.sae_evaluation.sums import Evaluation, EvaluationState
from actstore.analysis.scanning.chosen_rows import ChosenRows
from actstore.analysis.scanning.scan import ScanOptions, scan
from actstore.errors import JobError

if TYPE_CHECKING:
    from actstore.analysis.sae_evaluation.losses import LossProgress
    from actstore.hooks.model import HookedModel
    from actstore.hooks.naming.names import HookName
    from actstore.patching.loss_recovered import LossRecovered
    from actstore.store.committed_store import CommittedStore


def evaluate_sae(
    store: "CommittedStore",
    hook: "HookName",
    saes: Any,
    *,
    held_out: Any = None,
    seed: int = 0,
    dense_above: float = 0.1,
    model: "HookedModel | str | Path | None" = None,
    n_sequences: int = 64,
    on_loss_progress: "Callable[[LossProgress], None] | None" = None,
    **options: Unpack[ScanOptions],
) -> SaeEvaluation:
    """Measure sparse autoencoders on the rows of a store, all of them in one pass.

    SAEs in training are measured as what SAELens would save of them: the normalisation of rows is folded into the
    weights. The figures are SAELens' own, of all rows together instead of means of batches.

    Args:
        store: the store.
        hook: a stored hook.
        saes: an SAE of SAELens, or any object with ``encode`` and ``decode``, such as those of dictionary_learning; the
            folder of one that SAELens or `train_sae` wrote; a folder of such folders, such as the checkpoints of a
            training; or a list, or a dictionary by name, of these.
        held_out: rows to measure on: a fraction of the documents, which `held_out_rows` draws; or bool [n_sequences,
            positions] (or slots) or [n_sequences]. None for all rows.
        seed: seed of the documents that are drawn.
        dense_above: density above which a feature is called dense.
        model: the model of the store, or its name or folder, for the loss with each SAE in the place of the value: at
            the rows that are measured, and counted there. None leaves that out.
        n_sequences: stored sequences that the model reads, drawn with the seed; all if fewer have such rows.
        on_loss_progress: called after each batch of the model.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: an argument is not valid, an SAE does not fit the hook, no row is left, or the model is another one
            than that of the store.
        MissingExtraError: SAELens is needed and not installed.
        ActstoreError: see `scan`.
    """
    started = time.perf_counter()
    array = store.array_of(hook)
    rows = _held_out(held_out, seed, store)
    evaluated = saes_of(saes, array.shape)
    losses: Sequence[LossRecovered | None] = [None] * len(evaluated)
    if model is not None:  # first, since it tells soonest what is wrong
        from actstore.analysis.sae_evaluation.losses import losses_with_saes

        chosen = ChosenRows.of(
            store, options.get("drop", ()), options.get("seqpos"), options.get("sequences")
        )
        losses = losses_with_saes(
            model,
            store,
            array.name,
            evaluated,
            chosen,
            rows,
            n_sequences=n_sequences,
            seed=seed,
            on_progress=on_loss_progress,
        )
    reduction = Evaluation(array.name, evaluated, rows)
    scanned = scan(store, {"sums": reduction}, **options)
    state: EvaluationState = scanned.results["sums"]
    n_rows = int(state.counts[0])
    if not n_rows:
        raise JobError(f"no held-out row of {store.url} is left; hold out more of them, or drop fewer")
    return SaeEvaluation(
        hook=array.name,
        saes=tuple(figures_of(state, i, sae, dense_above, losses[i]) for i, sae in enumerate(evaluated)),
        n_rows=n_rows,
        n_not_finite=sum(scanned.n_not_finite.values()),
        store_url=store.url,
        seconds=time.perf_counter() - started,
    )


def _held_out(held_out: Any, seed: int, store: "CommittedStore") -> HeldOut | None:
    if held_out is None:
        return None
    if isinstance(held_out, int | float) and not isinstance(held_out, bool):
        return ByDocument(float(held_out), seed)
    return ByMask.of(held_out, store)
