"""What a model loses with SAEs in the place of a value, on stored tokens."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.sae_evaluation.autoencoder import EvaluatedSae
from actstore.analysis.sae_evaluation.held_out import HeldOut
from actstore.analysis.scanning.chosen_rows import ChosenRows
from actstore.errors import JobError
from actstore.hooks.model import HookedModel
from actstore.patching.loss_recovered import LossRecovered, recovered_of
from actstore.patching.losses_with_saes import LossesWithSaes, TokenBatch

if TYPE_CHECKING:
    import torch

    from actstore.store.committed_store import CommittedStore

_LOGITS_NBYTES: Final = 1 << 28
"""Bytes of the logits of a batch; those of two runs are held at once."""
_SEQUENCES_AT_ONCE: Final = 256
"""Sequences that are looked at together to find some with held-out tokens."""
_MOST_DIFFERENT: Final = 0.2
"""Relative difference of values from the stored ones above which they are of another model."""


@dataclass(frozen=True)
class LossProgress:
    """How far the losses are."""

    n_tokens: int
    """Tokens that the model has read with each SAE."""
    n_tokens_in_all: int
    seconds: float
    seconds_left: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens by second, of which the model reads each once with every SAE and three times without."""
        return self.n_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Sequence:
    """A stored sequence without its padding; all arrays are [length]."""

    number: int
    ids: NDArray[np.int64]
    is_read: NDArray[np.bool_]
    is_counted: NDArray[np.bool_]


def losses_with_saes(
    model: "HookedModel | str | Path",
    store: "CommittedStore",
    hook: str,
    saes: Sequence[EvaluatedSae],
    rows: ChosenRows,
    held_out: HeldOut | None,
    *,
    n_sequences: int,
    seed: int,
    on_progress: "Callable[[LossProgress], None] | None" = None,
) -> list[LossRecovered]:
    """The losses of each SAE. It stands at all rows that are chosen, and the held-out ones of them count.

    Args:
        model: the model of the store, or its name or folder.
        store: the store with the tokens.
        hook: the hook that the SAEs read and replace.
        saes: the SAEs.
        rows: the rows that an SAE reads.
        held_out: the rows that count; None for all that are read.
        n_sequences: sequences to take, drawn from those with rows that count; all if there are fewer.
        seed: seed of the draw.
        on_progress: called after each batch.

    Raises:
        HookError: the model does not have the hook, or its value cannot be replaced.
        JobError: the model does not give the stored values, or no row counts.
        ModelError: the model cannot be loaded.
    """
    if n_sequences < 1:
        raise JobError(f"n_sequences is {n_sequences}; it must be 1 or more")
    if not isinstance(model, HookedModel):
        model = HookedModel.from_pretrained(model, dtype=store.plan.request.dtype)
    sequences = _drawn(store, rows, held_out, n_sequences, seed)
    if not sequences:
        raise JobError(
            f"no row of {store.url} that counts is followed by another token; choose other rows, or leave the model out"
        )
    _check_model(model, store, hook, sequences[0])
    batches = list(_batches(model, sequences))
    started, n_in_all, n_done = time.perf_counter(), sum(batch.ids.numel() for batch in batches), 0

    def on_batch(batch: TokenBatch) -> None:
        nonlocal n_done
        n_done += batch.ids.numel()
        if on_progress is not None:
            seconds = time.perf_counter() - started
            on_progress(LossProgress(n_done, n_in_all, seconds, seconds / n_done * (n_in_all - n_done)))

    attached = {str(number): _Attached(sae, hook) for number, sae in enumerate(saes)}
    totals = LossesWithSaes(model, attached, hook).totals(batches, on_batch)
    return [recovered_of(totals, name, hook) for name in attached]


def _drawn(
    store: "CommittedStore", rows: ChosenRows, held_out: HeldOut | None, n_sequences: int, seed: int
) -> list[_Sequence]:
    """Some sequences with rows that count, in the order of the store."""
    allowed = np.arange(store.shape[0]) if rows.sequences is None else np.flatnonzero(rows.sequences)
    order = np.random.default_rng(seed).permutation(allowed)
    drawn: list[_Sequence] = []
    for first in range(0, len(order), _SEQUENCES_AT_ONCE):
        some = order[first : first + _SEQUENCES_AT_ONCE]
        # They are read in the order of the store, and taken in that of the draw.
        read = {one.number: one for one in _read(store, np.sort(some), rows, held_out)}
        found = [read[number] for number in some.tolist() if read[number].is_counted[:-1].any()]
        drawn += found[: n_sequences - len(drawn)]
        if len(drawn) == n_sequences:
            break
    return sorted(drawn, key=lambda one: one.number)


def _read(
    store: "CommittedStore", numbers: NDArray[np.int64], rows: ChosenRows, held_out: HeldOut | None
) -> Iterator[_Sequence]:
    """Sequences of these numbers, ascending, with what is read and what counts."""
    entries, width = store.entries, store.entries.width
    ids, lengths = store.tokens[numbers], store.lengths[numbers]
    positions, documents = entries.positions(numbers), entries.of_tokens(store.documents, numbers)
    all_taken = rows.taken(store, numbers)
    for i, number in enumerate(numbers.tolist()):
        taken = all_taken[i]
        counts = taken
        if held_out is not None:
            counts = taken & held_out(documents[i].astype(np.int64), number * width + np.arange(width))
        is_read, is_counted = (np.zeros(lengths[i], bool) for _ in range(2))
        is_read[positions[i][taken]] = True
        is_counted[positions[i][counts]] = True
        yield _Sequence(number, ids[i, : lengths[i]].astype(np.int64), is_read, is_counted)


def _batches(model: HookedModel, sequences: Sequence[_Sequence]) -> Iterator[TokenBatch]:
    """The sequences in batches of one length each, so that nothing is padded."""
    import torch

    n_tokens = max(1, _LOGITS_NBYTES // (4 * model.cfg.d_vocab))
    by_length: dict[int, list[_Sequence]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence.ids), []).append(sequence)
    for length, alike in by_length.items():
        step = max(1, n_tokens // length)
        for first in range(0, len(alike), step):
            some = alike[first : first + step]
            arrays = [
                np.stack([getattr(one, name) for one in some]) for name in ("ids", "is_read", "is_counted")
            ]
            yield TokenBatch(*(torch.from_numpy(array).to(model.device) for array in arrays))


def _check_model(model: HookedModel, store: "CommittedStore", hook: str, sequence: _Sequence) -> None:
    """Check that the model gives what is stored of a sequence.

    Raises:
        JobError: it does not.
    """
    import torch

    said = f"the model does not give what {store.url} has of {hook}; name {store.plan.request.model.name}"
    if int(sequence.ids.max()) >= model.cfg.d_vocab:
        raise JobError(f"{said}: it has {model.cfg.d_vocab:,} tokens, and {sequence.ids.max()} is stored")
    ids = torch.from_numpy(sequence.ids)[None].to(model.device)
    _, cache = model.run_with_cache(ids, names_filter=hook, return_type=None)
    value = cache[hook][0].float().cpu()
    stored = store[hook][sequence.number : sequence.number + 1][0].float()
    in_use = np.flatnonzero(store.entries.in_use(np.array([sequence.number]))[0])
    positions = store.entries.positions(np.array([sequence.number]))[0][in_use]
    value, stored = value[positions.tolist()], stored[in_use.tolist()]
    if value.shape != stored.shape:
        raise JobError(f"{said}: its value has shape {list(value.shape[1:])}, not {list(stored.shape[1:])}")
    difference = float((value - stored).norm() / stored.norm())
    if difference > _MOST_DIFFERENT:
        raise JobError(f"{said}: its values differ from the stored ones by {difference:.0%}")


class _Attached:
    """An SAE as `HookedModel.saes` takes it, which reads the hook in its own dtype."""

    def __init__(self, sae: EvaluatedSae, hook: str) -> None:
        self._sae = sae
        self.cfg = SimpleNamespace(hook_name=hook)

    def encode(self, x: "torch.Tensor", /) -> "torch.Tensor":
        """Features [batch, position, d_sae] of values [batch, position, d]."""
        features = self._sae.encode(x.reshape(-1, *self._sae.shape))
        return features.view(*x.shape[:2], -1)

    def decode(self, feature_acts: "torch.Tensor", /) -> "torch.Tensor":
        """Values [batch, position, d] of features."""
        rebuilt = self._sae.decode(feature_acts.flatten(0, 1))
        return rebuilt.view(*feature_acts.shape[:2], -1)
