"""Activations of prompts: what a store has is read, and the rest is computed and added to it."""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ActstoreError, IncompleteError, PlanMismatchError, StorageError, TokensError
from actstore.extraction.extract import extract
from actstore.extraction.planning.given import Given, taken
from actstore.extraction.planning.job import Job, parse_job
from actstore.extraction.planning.job_model import JobModel
from actstore.extraction.planning.planning import plan_job
from actstore.facade import Store
from actstore.hooks.cache.activation_cache import ActivationCache
from actstore.hooks.families.stored_config import hooks_of_stored
from actstore.hooks.naming.hook_points import point_of
from actstore.recall.lookup import Lookup, Work
from actstore.recall.prompts import Ids, ids_of
from actstore.storage.blobs import Blobs
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import IN_MEMORY, MAX_CONTEXT, ModelIdentity
from actstore.store.records.run import Run, read_runs
from actstore.tokens import open_memory
from actstore.tokens.memory.opening import PREFIX

if TYPE_CHECKING:
    import torch

    from actstore.hooks.model import HookedModel
    from actstore.hooks.naming.names import HookName

_FEW_PROMPTS: Final = 64
"""A store that begins with fewer prompts has small batches: every forward has a whole one, and few may be missing."""
_BATCH_OF_FEW: Final = 8
_BATCH_OF_MANY: Final = 16
_LENGTH_STEP: Final = 64
"""New stores have contexts of a multiple of this, so that the prompts of later calls fit."""
_MOST_ROUNDS: Final = 100
"""Times that a store is looked at before a call gives up; each time another process has been faster."""


def activations(
    model: "HookedModel | str | Path",
    tokens: Any,
    hooks: "HookName | Sequence[HookName]",
    store: str | Path,
    *,
    context_length: int | None = None,
    batch_size: int | None = None,
    dtype: "str | torch.dtype | None" = None,
) -> ActivationCache:
    """The activations of prompts: what the store has of them is read, the rest is computed and added to the store.

    The same call again computes nothing. Prompts are told apart by their token ids, so text and its ids are one prompt,
    and one that is given twice is computed once. Several processes may use one store at once.

    Args:
        model: a `HookedModel`, whose weights are those that it has now; or the name or folder of one, which is loaded
            only if something is to be computed. A store is of one of the two.
        tokens: a text; or a list of texts or of token ids, an array or a tensor of ids [n, position], or whatever else
            `actstore.extract` takes from memory. Text begins with the BOS token, as in `HookedModel.to_tokens`.
        hooks: names, globs or pairs such as ``("resid_post", 5)``.
        store: folder or URL of the store, which is made by the first call.
        context_length: the longest prompt that a new store has room for. None for the longest of this call, rounded up
            to a multiple of 64, if the model has so many positions.
        batch_size: sequences in a forward, for a new store. None for 8, or 16 if the first call has 64 prompts or more.
        dtype: dtype to compute and to store in, for a model that is named. None for the one it was saved in.

    Returns:
        Values [prompt, position, ...] on the CPU, in the order of the prompts, padded on the right to the longest of
        them; what is at padding means nothing. Methods that need weights work with a `HookedModel` only. Values can
        differ from those of another forward in the last bits, as a batch has another shape.

    Raises:
        HookError, ModelError: there is no such hook or model, or a store cannot hold it.
        JobError: an option is not valid.
        TokensError: there are no prompts, or one is empty or too long.
        PlanMismatchError: the store is of another model or dtype, or of chosen positions.
        ActstoreError: the store cannot be read or written, or the computation fails.
    """
    url = str(store)
    fields, given = taken({"model": model, "hooks": hooks, "dtype": dtype})
    fields |= {"tokens": PREFIX, "out": url, "packing": "document", "append": True, "batch_size": batch_size}
    if context_length is not None:
        fields["context_length"] = context_length
    job = parse_job(fields, where="activations")
    blobs = open_blobs(url)
    with ThreadPoolExecutor(1, thread_name_prefix="fingerprint") as thread:
        return _answered(_Asked.of(job, given, tokens, thread), blobs, context_length, batch_size)


def _answered(
    asked: "_Asked", blobs: Blobs, context_length: int | None, batch_size: int | None
) -> ActivationCache:
    """The activations, of which what is missing is computed first.

    Raises:
        IncompleteError: other processes have been faster again and again.
        ActstoreError: see `activations`.
    """
    url = blobs.url
    for _ in range(_MOST_ROUNDS):
        runs = read_runs(blobs)
        if runs:
            stored = Store.in_storage(blobs)
            length = asked.length_in(stored, context_length)
            found = Lookup(stored, asked.sequences, asked.hook_names(length))
            work, batch = found.work, None
            if not work:
                cache = asked.read(stored, found)
                # The weights are hashed while values are read.
                asked.check_model(stored)
                return cache
            asked.check_model(stored)
        else:
            length = asked.length_of_new(url, context_length)
            work, batch = [Work(asked.sequences, asked.hook_names(length))], batch_size or asked.usual_batch
        try:
            for part in work:
                asked.compute(part, context_length=length, batch_size=batch)
        except (PlanMismatchError, StorageError):
            # Another process may have begun a run in the place of ours. If none has, the error is about ours.
            if _progress(read_runs(blobs)) == _progress(runs):
                raise
    raise IncompleteError(
        f"{url} was changed by other processes each of {_MOST_ROUNDS} times that the prompts were looked for; make the "
        "same call again"
    )


@dataclass(frozen=True)
class _Asked:
    """The prompts and hooks of one call."""

    job: Job
    given: Given
    model: JobModel
    identity: Future[ModelIdentity]
    """The identity of the model, whose weights are hashed in another thread."""
    sequences: list[Ids]
    """The different prompts."""
    numbers: NDArray[np.int64]
    """Which of `sequences` each prompt is, [n_prompts]."""
    longest: int
    """Tokens of the longest prompt."""

    @classmethod
    def of(cls, job: Job, given: Given, tokens: Any, thread: ThreadPoolExecutor) -> "_Asked":
        model = JobModel(job, given.model)
        identity = thread.submit(model.identity)
        prompts = ids_of(tokens, job.model, given.model)
        known: dict[bytes, int] = {}
        numbers = [known.setdefault(ids.tobytes(), len(known)) for ids in prompts]
        different = [np.frombuffer(ids, np.int32) for ids in known]
        longest = max(map(len, different))
        if model.n_positions is not None and longest > model.n_positions:
            raise TokensError(
                f"the longest prompt has {longest:,} tokens, and {job.model} has {model.n_positions:,} positions; cut "
                "it, or leave it out"
            )
        return cls(job, given, model, identity, different, np.array(numbers), longest)

    def hook_names(self, context_length: int) -> tuple[str, ...]:
        return tuple(hook.name for hook in self.model.hooks(context_length))

    @property
    def usual_batch(self) -> int:
        """Sequences in a forward of a store that this call makes."""
        return _BATCH_OF_FEW if len(self.sequences) < _FEW_PROMPTS else _BATCH_OF_MANY

    def length_of_new(self, url: str, wanted: int | None) -> int:
        """The context length of a store that this call makes.

        Raises:
            TokensError: the prompts are longer than the wanted one.
        """
        if wanted is not None:
            self._check_length(url, wanted)
            return wanted
        limit = self.model.n_positions or MAX_CONTEXT
        return min(math.ceil(self.longest / _LENGTH_STEP) * _LENGTH_STEP, limit)

    def length_in(self, store: Store, wanted: int | None) -> int:
        """The context length of a store that is there.

        Raises:
            PlanMismatchError: the store cannot hold these activations.
            TokensError: its sequences are shorter than the prompts.
        """
        try:
            return self._checked_length(store, wanted)
        except ActstoreError:
            self.check_model(store)  # if it is of another model, that is what is wrong
            raise

    def check_model(self, store: Store) -> None:
        """Wait until the weights are hashed, and check that a store is of this model.

        Raises:
            PlanMismatchError: it is of another one.
            ModelError: the weights cannot be hashed.
        """
        there, here = store.plan.request.model, self.identity.result()
        if there.fingerprint != here.fingerprint:
            is_mixed = there.fingerprint.startswith(IN_MEMORY) != here.fingerprint.startswith(IN_MEMORY)
            hint = " (a model in memory never counts as that of a folder)" if is_mixed else ""
            raise PlanMismatchError(
                f"{store.url} holds activations of {there.name} with the fingerprint {there.fingerprint}, and "
                f"{here.name} has {here.fingerprint}{hint}; give the model that it was begun with, or another store"
            )

    def _checked_length(self, store: Store, wanted: int | None) -> int:
        plan = store.plan
        length = plan.context_length
        if self.model.dtype != plan.request.dtype:
            raise PlanMismatchError(
                f"{store.url} holds {plan.request.dtype}, and {self.model.dtype} was asked for; give that dtype, or "
                "another store"
            )
        if plan.n_slots is not None:
            raise PlanMismatchError(
                f"{store.url} holds only the positions {plan.request.tokens.positions}, and activations of prompts are "
                "of all positions; give another store"
            )
        if wanted not in (None, length):
            raise PlanMismatchError(
                f"{store.url} has sequences of {length} tokens, and context_length is {wanted}; leave it out, or give "
                "another store"
            )
        self._check_length(store.url, length)
        return length

    def _check_length(self, url: str, length: int) -> None:
        if self.longest > length:
            raise TokensError(
                f"the longest prompt has {self.longest:,} tokens, and sequences of {url} have room for {length:,}; "
                f"give another store, with a context_length of {self.longest:,} or more"
            )

    def compute(self, work: Work, *, context_length: int, batch_size: int | None) -> None:
        """Compute and commit some sequences in one run.

        Args:
            work: the sequences and hooks.
            context_length: that of the store.
            batch_size: that of a new store; None for that of the store.
        """
        source = open_memory(work.sequences)
        changes = {
            "tokens": source.url,
            "hooks": work.hooks,
            "context_length": context_length,
            "batch_size": batch_size,
        }
        # Without a tokenizer, equal ids are equal sources, whichever tokenizer a model has or lacks.
        given = replace(self.given, tokens=source, tokenizer=None, is_model_checked=True)
        extract(plan_job(self.job.model_copy(update=changes), given))

    def read(self, store: Store, found: Lookup) -> ActivationCache:
        """The values of all prompts, in their order."""
        values = {}
        for hook, rows in found.rows.items():
            point = point_of(hook)
            assert point is not None  # it is stored
            value = store[hook][rows[self.numbers], : self.longest]
            if "source_position" in point.axes:
                value = value[..., : self.longest].contiguous()
            values[hook] = value.movedim(1, point.position_axis)
        live = self.given.model
        if live is not None:
            return ActivationCache(values, live.hooked, kind="activations")
        names, cfg = hooks_of_stored(store.plan.request.model.config)
        return ActivationCache(values, names=names, cfg=cfg, kind="activations")


def _progress(runs: Sequence[Run]) -> list[tuple[str, bool, int, bool]]:
    """What changes in a store whenever a process gets further with it."""
    return [(run.plan.run, run.has_tokens, len(run.committed), run.finished is not None) for run in runs]
