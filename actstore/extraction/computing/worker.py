"""The worker, which runs the model over one segment at a time and commits it. Every executor uses this plain class."""

import contextlib
import queue
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from actstore._version import __version__
from actstore.errors import ActstoreError, ExtractError, ModelError, StorageError
from actstore.extraction.batches import filled_up, stored_entries
from actstore.extraction.computing.buffers import SegmentBuffers
from actstore.extraction.computing.heap import keep_large_blocks
from actstore.extraction.computing.interruptible import interruptible
from actstore.extraction.computing.segment_commit import SegmentWriter, Values
from actstore.extraction.events import SegmentDone
from actstore.extraction.fingerprint import fingerprint
from actstore.extraction.live_model import memory_fingerprint
from actstore.extraction.value_checks.golden import Expected, compute_expected, golden, sampled_row
from actstore.extraction.value_checks.plain_forward import positions_first
from actstore.extraction.value_checks.reference import Reference, reference_for
from actstore.hooks.loading.pretrained import chosen_device
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import layers_needed
from actstore.reason import reason
from actstore.storage.blobs import Blobs
from actstore.storage.opening import open_blobs
from actstore.store.format.batches import Batch, places
from actstore.store.format.dtypes import dtype
from actstore.store.format.plan import FIRST_RUN, Plan, Segment
from actstore.store.locking.turns import Turn
from actstore.store.reading.segment_tokens import SegmentTokens, TokenReader
from actstore.store.records.commit import CommitRecord, Environment, Golden, commit_key, has_golden, read_plan
from actstore.store.statistics.moments import Moments
from actstore.store.statistics.not_finite import NotFinite, not_finite

if TYPE_CHECKING:
    import torch

SEGMENTS_IN_FLIGHT = 3
"""Number of segments that a worker holds: one in the forward, two being written. Each takes the memory of a segment."""


@dataclass(frozen=True)
class _Computed:
    """The results of a segment besides the values in the buffers."""

    record: CommitRecord
    """The record without its shards."""
    norms: Mapping[str, NDArray[np.float32]]
    """Norms by hook in stored order, [n_sequences, width]."""
    places: NDArray[np.int64] | None
    """Where each sequence is in the buffers; None if in stored order."""
    seconds: float
    """Time in the model."""
    seconds_waiting: float
    """Time that the model waited before."""
    not_finite: frozenset[str]
    """Hooks that can hold NaN or infinity."""


class InterruptedRunError(ActstoreError):
    """Raised in a run that was asked to stop. What is committed stays."""


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to start on any machine: a few strings; or, in this process, the model itself."""

    unit: ClassVar[str] = "segment"
    """See `actstore.extraction.computing.executor.Spec`."""

    url: str
    """URL of the store, which has the plan and the tokens."""
    model: str
    """Hub name or folder of the model on the machine of the worker; its weights must be those of the plan."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    device: str | None = None
    run: str = FIRST_RUN
    """Name of the run in the store."""
    n_threads: int | None = None
    """CPU threads of the forward; None leaves torch's choice."""
    is_strict: bool = False
    """Whether all shards of a segment must be of one attempt, bit for bit."""
    is_conditional: bool = True
    """Whether storage refuses to create a key twice; if not, the caller of the worker commits."""
    turn: Turn | None = None
    """Turn of the caller of the worker. Once it is over, nothing more is committed."""
    live: HookedModel | None = None
    """The model itself, if it is in the memory of this process; ``model`` is then only its name."""
    is_live_checked: bool = False
    """Whether the fingerprint of the model in memory was taken in the very call that computes, so that it is not taken
    again.
    """

    def start(self) -> "Worker":
        return Worker(self)


class Worker:
    """Holds the model and computes segments.

    `run` may be called from `SEGMENTS_IN_FLIGHT` threads at once: their forwards take turns, and while one is in the
    forward the others write.
    """

    def __init__(self, spec: WorkerSpec, forward: Executor | None = None) -> None:
        """Load the model.

        Args:
            spec: what to compute, and where.
            forward: runs the forwards of a model in memory, one at a time; None for a thread of the worker.

        Raises:
            ModelError: the model cannot be loaded, or its weights are not the planned ones.
            StorageError: the store cannot be read.
        """
        import torch

        self._spec = spec
        self._blobs: Blobs = open_blobs(spec.url)
        plan = read_plan(self._blobs, spec.run)
        if plan is None:
            raise StorageError(
                f"there is no plan of run {spec.run} at {spec.url}; run `actstore extract` to make it"
            )
        self._plan: Plan = plan
        if spec.n_threads is not None:
            torch.set_num_threads(spec.n_threads)
        if chosen_device(spec.device).startswith("cpu"):
            keep_large_blocks()  # before the thread of the forward allocates anything
        # One thread, so that segments go first in, first out, and torch makes one pool of threads. It would make
        # another for a thread that loads the model: with more threads in all pools than there are cores, they sleep
        # as soon as they wait, and a forward on a CPU takes up to a third longer.
        self._forward = forward or ThreadPoolExecutor(1, thread_name_prefix="forward")
        try:
            if forward is None:
                self._model = interruptible(self._forward, lambda: load_planned_model(plan, spec))
            else:
                self._model = load_planned_model(plan, spec)
        except BaseException:
            self._forward.shutdown(wait=False)
            raise
        self._device = self._model.device
        self._tokens = TokenReader(self._blobs, plan)
        self._moments = Moments(plan.request.hooks, self._device, covariance=plan.request.covariance)
        self._is_checked = False
        self._free: queue.SimpleQueue[SegmentBuffers] = queue.SimpleQueue()
        for _ in range(min(SEGMENTS_IN_FLIGHT, plan.n_segments)):
            self._free.put(SegmentBuffers(plan, self._device))
        self._writer = SegmentWriter(
            self._blobs,
            plan,
            is_strict=spec.is_strict,
            is_conditional=spec.is_conditional,
            fence=lambda: None if spec.turn is None else spec.turn.check(self._blobs),
        )
        self._stopped = threading.Event()
        self._has_begun = False
        self._first_is_queued = threading.Event()
        self._counting = threading.Lock()
        self._n_retries = 0
        self._idle_since = time.perf_counter()

    def run(self, index: int) -> SegmentDone:
        """Compute, write and commit one segment.

        Raises:
            ExtractError: the forward failed; the message names the segment.
            StorageError: writing failed.
            InterruptedRunError: `stop` was called.
        """
        segment = self._plan.segment(index)
        with self._first_call_first():
            if self._blobs.head(commit_key(self._plan.run, index)) is not None:
                return SegmentDone(index, segment.n_sequences, 0, 0.0, 0.0, 0.0, is_new=False)
            tokens = self._tokens(segment)
            buffers = self._free.get()
            forward = self._forward.submit(self._compute, segment, tokens, buffers)
        try:
            computed = forward.result()
            started = time.perf_counter()
            values = buffers.rows(segment, computed.places)
            record = self._writer.write(
                segment, values, computed.norms, computed.record, tokens.counts, tokens.batches
            )
            non_finite_tokens = self._not_finite(segment, values, tokens.counts, computed.not_finite)
        finally:
            self._free.put(buffers)
        return SegmentDone(
            index,
            segment.n_sequences,
            sum(shard.nbytes for shard in record.shards.values()),
            computed.seconds,
            computed.seconds_waiting,
            time.perf_counter() - started,
            n_tokens=record.n_tokens,
            n_rows=int(tokens.counts.sum()),
            n_retries=self._new_retries(),
            record=None if self._writer.is_conditional else record,
            not_finite=non_finite_tokens,
        )

    @contextlib.contextmanager
    def _first_call_first(self) -> Iterator[None]:
        """Let calls wait until the first one has queued its forward. If that is for the run's first segment, which is
        always checked, another segment before it would be checked as well, as the first one of this worker.
        """
        with self._counting:
            is_first, self._has_begun = not self._has_begun, True
        if not is_first:
            self._first_is_queued.wait()
        try:
            yield
        finally:
            self._first_is_queued.set()

    def _not_finite(
        self, segment: Segment, values: Values, counts: NDArray[Any], suspects: Collection[str]
    ) -> dict[str, NotFinite]:
        """The tokens that are not finite, for each of the suspected hooks that has any."""
        request = self._plan.request
        width = f"<u{dtype(request.dtype).itemsize}"
        by_hook = {
            name: not_finite(
                name,
                values[name][: segment.n_sequences].view(width),
                request.dtype,
                counts,
                first_sequence=segment.start,
                batch_size=request.batch_size,
            )
            for name in suspects
        }
        return {name: tokens for name, tokens in by_hook.items() if tokens.n_tokens}

    def _new_retries(self) -> int:
        """Number of requests to storage that were repeated since the last call of this method."""
        with self._counting:
            new = self._blobs.n_retries - self._n_retries
            self._n_retries += new
            return new

    def stop(self) -> None:
        """Give up the running forward and those that wait; segments that are being written are finished."""
        self._stopped.set()

    def close(self) -> None:
        """End the threads."""
        self._forward.shutdown(cancel_futures=True)
        self._writer.close()

    def _compute(self, segment: Segment, tokens: SegmentTokens, buffers: SegmentBuffers) -> "_Computed":
        """Run the forwards of all batches of a segment."""
        # In the same turn of the forward: otherwise the next segment would be checked as the first of this worker.
        # No file has the weights of a model in memory, so nothing but itself can be asked, at the end.
        has_reference = segment.index == 0 and self._spec.live is None
        of_row = self._expected_of_first(segment, tokens) if has_reference else None
        started = time.perf_counter()
        waiting = started - self._idle_since
        self._moments.reset()
        place = places(tokens.batches)
        with self._naming(segment):
            start = 0
            for batch in tokens.batches:
                if self._stopped.is_set():
                    raise InterruptedRunError("the run was asked to stop")
                self._batch(tokens, batch, start, buffers)
                start += len(batch.rows)
            buffers.finish()
            record = CommitRecord(
                segment=segment.index,
                n_sequences=segment.n_sequences,
                n_tokens=int(tokens.lengths.sum()),
                shards={},
                statistics=self._moments.records(),
                golden=self._check(segment, tokens, buffers, place, of_row),
                environment=self._environment(tokens),
            )
            norms = self._moments.norms(self._plan.width) if self._plan.norms else {}
        if place is not None:
            norms = {name: hook_norms[place] for name, hook_norms in norms.items()}
        self._idle_since = time.perf_counter()
        suspects = frozenset(self._moments.not_finite_hooks())
        return _Computed(record, norms, place, self._idle_since - started, waiting, suspects)

    @contextlib.contextmanager
    def _naming(self, segment: Segment) -> Iterator[None]:
        """Turn errors of libraries into one that names the segment.

        Raises:
            ExtractError: an error was raised that is not one of actstore's.
        """
        try:
            yield
        except ActstoreError:
            raise
        except Exception as error:
            raise ExtractError(
                f"segment {segment.index} (sequences {segment.start}:{segment.stop}) failed in the forward on "
                f"{self._device}: {reason(error)}" + _advice(error)
            ) from error

    def _expected_of_first(self, segment: Segment, tokens: SegmentTokens) -> Expected:
        """Values for the golden sequence of the run's first segment, from a model that shares nothing with this one."""
        import torch

        started = time.perf_counter()
        with self._naming(segment):
            reference = self._reference()
            try:
                of_row = self._compute_expected(reference, segment, tokens)
            except torch.OutOfMemoryError:  # two models and a forward were too much
                if reference.kind == "loaded":
                    raise
                del reference
                torch.cuda.empty_cache()
                of_row = self._compute_expected(Reference(self._model, "loaded"), segment, tokens)
        self._idle_since += time.perf_counter() - started
        return of_row

    def _reference(self) -> Reference:
        shape = (self._plan.request.batch_size, self._plan.context_length)
        return reference_for(self._spec.model, self._spec.revision, self._model, shape)

    def _sampled(self, segment: Segment, tokens: SegmentTokens) -> int:
        """The sequence of a segment that is checked, counted within it."""
        return sampled_row(self._plan.tokens_sha256, segment, tokens.counts) - segment.start

    def _compute_expected(self, reference: Reference, segment: Segment, tokens: SegmentTokens) -> Expected:
        row = self._sampled(segment, tokens)
        batch = next(batch for batch in tokens.batches if row in batch.rows)
        return compute_expected(
            reference,
            filled_up(tokens.tokens, batch, self._plan.request.batch_size),
            batch.rows.tolist().index(row),
            int(tokens.lengths[row]),
            self._plan.hook_names,
            positions=tokens.entries(row),
            context_length=self._plan.context_length,
        )

    def _check(
        self,
        segment: Segment,
        tokens: SegmentTokens,
        buffers: SegmentBuffers,
        place: NDArray[Any] | None,
        of_row: Expected | None,
    ) -> Golden | None:
        """Compare one row with the plain forward, for the first segment of this worker and those that record it.

        Raises:
            ModelError: the plain forward gives other values.
        """
        is_recorded = has_golden(segment.index)
        if self._is_checked and not is_recorded:
            return None
        if of_row is None:
            of_row = self._compute_expected(Reference(self._model, "loaded"), segment, tokens)
        row = self._sampled(segment, tokens)
        captured = buffers.sequence(row if place is None else int(place[row]))
        checked = golden(of_row, captured, segment.start + row)
        self._is_checked = True
        return checked if is_recorded else None

    def _batch(self, tokens: SegmentTokens, batch: Batch, start: int, buffers: SegmentBuffers) -> None:
        """Run the forward of a batch, whose values go to the buffers from row ``start`` on."""
        import torch

        plan = self._plan
        n_sequences = len(batch.rows)
        n_entries = min(batch.width, plan.width) if tokens.positions is None else plan.width
        counts = torch.from_numpy(tokens.counts[batch.rows]).to(self._device)
        is_used = torch.arange(n_entries, device=self._device) < counts[:, None]
        positions = None
        if tokens.positions is not None:
            positions = torch.from_numpy(tokens.positions[batch.rows]).to(self._device, torch.int64)

        def take(hook: str, value: "torch.Tensor") -> None:
            # Rows that fill up the batch are left out.
            value = positions_first(hook, value)[:n_sequences]
            value = stored_entries(hook, value, positions, plan.context_length)
            buffers.put(hook, start, n_sequences, value, n_entries)
            self._moments.add(hook, value, is_used)

        if not tokens.counts[batch.rows].any():
            for hook in plan.request.hooks:  # nothing of the batch is stored, so nothing is computed
                shape = (n_sequences, n_entries, *hook.shape)
                zeros = torch.zeros(shape, dtype=self._model.dtype, device=self._device)
                buffers.put(hook.name, start, n_sequences, zeros, n_entries)
                self._moments.add(hook.name, zeros, is_used)
            return
        rows = torch.from_numpy(filled_up(tokens.tokens, batch, plan.request.batch_size))
        self._model.run(rows.to(self._device, torch.int64), plan.hook_names, take)

    def _environment(self, tokens: SegmentTokens) -> Environment:
        import torch
        import transformers

        is_gpu = self._device.type == "cuda"
        return Environment(
            actstore=__version__,
            engine="transformers",
            torch=str(torch.__version__),
            transformers=transformers.__version__,
            device=torch.cuda.get_device_name(self._device) if is_gpu else self._device.type,
            attention=self._model.attention,
            batch=(self._plan.request.batch_size, max(batch.width for batch in tokens.batches)),
        )


def load_planned_model(plan: Plan, spec: WorkerSpec) -> HookedModel:
    """The model of a plan, loaded on this machine with the layers that the plan needs.

    Raises:
        ModelError: the model cannot be loaded, or its weights are not the planned ones.
    """
    check_weights(plan, spec)
    if spec.live is not None:
        return spec.live
    return HookedModel.from_pretrained(
        spec.model,
        dtype=plan.request.dtype,
        device=spec.device,
        revision=spec.revision,
        n_layers=layers_needed(plan.hook_names, plan.request.model.n_layers),
        has_head=False,
    )


def check_weights(plan: Plan, spec: WorkerSpec) -> None:
    """Refuse a model on this machine whose weights are not the planned ones.

    Raises:
        ModelError: the weights are others.
    """
    planned = plan.request.model.fingerprint
    if spec.live is not None and spec.is_live_checked:
        return
    if spec.live is not None:
        actual = memory_fingerprint(spec.live)
    elif plan.request.model.was_in_memory:
        whole = HookedModel.from_pretrained(
            spec.model, dtype=plan.request.dtype, device=spec.device, revision=spec.revision
        )
        actual = memory_fingerprint(whole)
    else:
        actual = fingerprint(spec.model, spec.revision)
    if actual != planned and plan.request.model.was_in_memory:
        raise ModelError(
            f"the plan was made with a model in memory whose weights are {planned}, and those of {spec.model} are "
            f"{actual}; give that model, or the folder that it was saved to"
        )
    if actual != planned:
        raise ModelError(
            f"the weights of {spec.model} on this machine are {actual}, the plan was made with {planned}; use the same "
            "model files everywhere"
        )


def _advice(error: Exception) -> str:
    is_memory = "out of memory" in str(error).lower() or isinstance(error, MemoryError)
    return "; choose a smaller batch_size and another out" if is_memory else ""
