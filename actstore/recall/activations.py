"""Activations of prompts: what a store has is read, and the rest is computed and added to it."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

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
from actstore.recall.answers import Limits, StoredPrompts
from actstore.recall.lookup import Lookup, Work
from actstore.recall.prompts import Ids, ids_of
from actstore.recall.values import as_cached
from actstore.storage.blobs import Blobs
from actstore.storage.opening import open_blobs
from actstore.store.format.dtypes import dtype as dtype_of
from actstore.store.format.plan import IN_MEMORY, MAX_CONTEXT, ModelIdentity
from actstore.store.records.run import Run, read_runs
from actstore.tokens import open_memory
from actstore.tokens.memory.opening import PREFIX

if TYPE_CHECKING:
    import torch

    from actstore.hooks.model import HookedModel
    from actstore.hooks.naming.names import HookName

T = TypeVar("T")
_FEW_PROMPTS: Final = 64
"""A store that begins with fewer prompts has small batches: every forward has a whole one, and few may be missing."""
_BATCH_OF_FEW: Final = 8
_BATCH_OF_MANY: Final = 16
_LENGTH_STEP: Final = 64
"""New stores have contexts of a multiple of this, so that the prompts of later calls fit."""
_MOST_ROUNDS: Final = 100
"""Times that a store is looked at before a call gives up; each time another process has been faster."""


def recalled(
    model: "HookedModel | str | Path",
    tokens: Any,
    hooks: "HookName | Sequence[HookName]",
    store: str | Path,
    *,
    context_length: int | None = None,
    batch_size: int | None = None,
    dtype: "str | torch.dtype | None" = None,
) -> ActivationCache:
    """The activations of prompts: what a store has of them is read, and the rest is computed and added to it first. See
    `actstore.activations`.
    """
    return _from_store(_Asked.read, model, tokens, hooks, store, context_length, batch_size, dtype)


def stored_prompts(
    model: "HookedModel | str | Path",
    tokens: Any,
    hooks: "HookName | Sequence[HookName]",
    store: str | Path,
    limits: Limits,
) -> StoredPrompts:
    """Where a store has the activations of prompts, once those that it lacks are computed and added. Nothing is read
    besides token ids.

    Raises:
        TokensError: the prompts cost more than the limits allow.
        ActstoreError: see `actstore.activations`.
    """
    return _from_store(_Asked.places, model, tokens, hooks, store, limits=limits)


def _from_store(
    finish: "Callable[[_Asked, Store, Lookup], T]",
    model: "HookedModel | str | Path",
    tokens: Any,
    hooks: "HookName | Sequence[HookName]",
    store: str | Path,
    context_length: int | None = None,
    batch_size: int | None = None,
    dtype: "str | torch.dtype | None" = None,
    limits: Limits | None = None,
) -> T:
    url = str(store)
    fields, given = taken({"model": model, "hooks": hooks, "dtype": dtype})
    fields |= {"tokens": PREFIX, "out": url, "packing": "document", "append": True, "batch_size": batch_size}
    if context_length is not None:
        fields["context_length"] = context_length
    job = parse_job(fields, where="activations")
    blobs = open_blobs(url)
    with ThreadPoolExecutor(1, thread_name_prefix="fingerprint") as thread:
        return _answered(
            _Asked.of(job, given, tokens, thread, limits), finish, blobs, context_length, batch_size
        )


def _answered(
    asked: "_Asked",
    finish: "Callable[[_Asked, Store, Lookup], T]",
    blobs: Blobs,
    context_length: int | None,
    batch_size: int | None,
) -> T:
    """What ``finish`` makes of the store once it has everything.

    Raises:
        IncompleteError: other processes have been faster again and again.
        ActstoreError: see `actstore.activations`.
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
                result = finish(asked, stored, found)
                # The weights are hashed while values are read.
                asked.check_model(stored)
                return result
            asked.check_model(stored)
            asked.check_cost(stored, work)
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
    limits: Limits | None = None

    @classmethod
    def of(
        cls, job: Job, given: Given, tokens: Any, thread: ThreadPoolExecutor, limits: Limits | None
    ) -> "_Asked":
        model = JobModel(job, given.model)
        identity = thread.submit(model.identity)
        prompts = ids_of(tokens, job.model, given.model)
        if limits is not None:
            limits.check_tokens(sum(map(len, prompts)))
        known: dict[bytes, int] = {}
        numbers = [known.setdefault(ids.tobytes(), len(known)) for ids in prompts]
        different = [np.frombuffer(ids, np.int32) for ids in known]
        longest = max(map(len, different))
        if model.n_positions is not None and longest > model.n_positions:
            raise TokensError(
                f"the longest prompt has {longest:,} tokens, and {job.model} has {model.n_positions:,} positions; cut "
                "it, or leave it out"
            )
        return cls(job, given, model, identity, different, np.array(numbers), longest, limits)

    def hook_names(self, context_length: int) -> tuple[str, ...]:
        return tuple(hook.name for hook in self.model.hooks(context_length))

    def check_cost(self, store: Store, work: Sequence[Work]) -> None:
        """Check that the store may take what is to be computed.

        Raises:
            TokensError: it would become too large.
        """
        if self.limits is None:
            return
        of_hooks = {hook.name: math.prod(hook.shape) for hook in self.model.hooks(store.plan.context_length)}
        of_hooks |= {
            hook.name: math.prod(hook.shape) for run in store.runs for hook in run.plan.request.hooks
        }
        there = [(run.plan.n_sequences, run.plan.hook_names) for run in store.runs]
        more = [(len(part.sequences), part.hooks) for part in work]
        row_nbytes = store.plan.context_length * dtype_of(store.plan.request.dtype).itemsize
        nbytes, nbytes_more = (
            row_nbytes * sum(n * sum(of_hooks[hook] for hook in hooks) for n, hooks in runs)
            for runs in (there, more)
        )
        self.limits.check_nbytes(nbytes, nbytes_more)

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
            values[hook] = as_cached(hook, store[hook][rows[self.numbers], : self.longest], self.longest)
        live = self.given.model
        if live is not None:
            return ActivationCache(values, live.hooked, kind="activations")
        names, cfg = hooks_of_stored(store.plan.request.model.config)
        return ActivationCache(values, names=names, cfg=cfg, kind="activations")

    def places(self, _store: Store, found: Lookup) -> StoredPrompts:
        """Where all prompts are, in their order."""
        lengths = np.array([len(ids) for ids in self.sequences])[self.numbers]
        return StoredPrompts({hook: rows[self.numbers] for hook, rows in found.rows.items()}, lengths)


def _progress(runs: Sequence[Run]) -> list[tuple[str, bool, int, bool]]:
    """What changes in a store whenever a process gets further with it."""
    return [(run.plan.run, run.has_tokens, len(run.committed), run.finished is not None) for run in runs]
