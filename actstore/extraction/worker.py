"""The worker: runs the model over one segment at a time and commits it. A plain class; every executor uses it."""

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from actstore._version import __version__
from actstore.errors import ActstoreError, ExtractError, ModelError, StorageError
from actstore.extraction.buffers import SegmentBuffers
from actstore.extraction.events import SegmentDone
from actstore.extraction.fingerprint import fingerprint
from actstore.extraction.heap import keep_large_blocks
from actstore.hooks.model import HookedModel
from actstore.hooks.names import layers_needed
from actstore.hooks.point import point_of
from actstore.store.blobs import Blobs, open_blobs
from actstore.store.commit import CommitRecord, Environment, ShardRecord, commit_key, put, read_plan
from actstore.store.plan import Plan, Segment
from actstore.store.rows import Rows
from actstore.store.shard import encode

if TYPE_CHECKING:
    import torch

SEGMENTS_IN_FLIGHT = 3
"""One in the forward, two being written. Each costs the memory of a whole segment."""
_WRITERS = 4


class InterruptedRunError(ActstoreError):
    """The run was asked to stop. What is committed stays."""


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to start, anywhere: a few strings."""

    url: str
    """Of the store; the plan and the tokens are there."""
    model: str
    """Hub name or folder as this machine knows it; its weights must be those of the plan."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    device: str | None = None
    n_threads: int | None = None
    """CPU threads of the forward; None leaves torch's choice."""

    def start(self) -> "Worker":
        return Worker(self)


class Worker:
    """Holds the model. `run` may be called from `SEGMENTS_IN_FLIGHT` threads at once: their forwards take turns,
    and while one is in the forward the others write.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        """Load the model.

        Raises:
            ModelError: it cannot be loaded, or its weights are not the planned ones.
            StorageError: the store cannot be read.
        """
        import torch

        self._blobs: Blobs = open_blobs(spec.url)
        plan = read_plan(self._blobs)
        if plan is None:
            raise StorageError(f"there is no plan at {spec.url}; run `actstore extract` to make it")
        self._plan: Plan = plan
        planned = plan.request.model
        found = fingerprint(spec.model, spec.revision)
        if found != planned.fingerprint:
            raise ModelError(
                f"the weights of {spec.model} on this machine are {found}, the plan was made with "
                f"{planned.fingerprint}; use the same model files everywhere"
            )
        if spec.n_threads is not None:
            torch.set_num_threads(spec.n_threads)
        self._device = torch.device(spec.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._device.type == "cpu":
            keep_large_blocks()
        self._model = HookedModel.from_pretrained(
            spec.model,
            dtype=plan.request.dtype,
            device=str(self._device),
            revision=spec.revision,
            n_layers=layers_needed(plan.hook_names, plan.request.model.n_layers),
            has_head=False,
        )
        layout = next(layout for layout in plan.token_arrays() if layout.path == "tokens")
        self._tokens = Rows(self._blobs, layout, lambda _: True)
        self._free: queue.SimpleQueue[SegmentBuffers] = queue.SimpleQueue()
        for _ in range(min(SEGMENTS_IN_FLIGHT, plan.n_segments)):
            self._free.put(SegmentBuffers(plan, self._device))
        # One thread, so that torch keeps one pool of threads of its own, and segments go first in, first out.
        self._forward = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="write")
        self._stopped = threading.Event()
        self._idle_since = time.perf_counter()

    def run(self, index: int) -> SegmentDone:
        """Compute, write and commit one segment.

        Raises:
            ExtractError: the forward failed; it names the segment.
            StorageError: writing failed.
            InterruptedRunError: `stop` was called.
        """
        segment = self._plan.segment(index)
        if self._blobs.size(commit_key(index)) is not None:
            return SegmentDone(index, segment.n_sequences, 0, 0.0, 0.0, 0.0, is_new=False)
        tokens = self._tokens[segment.start : segment.stop]
        buffers = self._free.get()
        try:
            forward, waiting = self._forward.submit(self._compute, segment, tokens, buffers).result()
            started = time.perf_counter()
            nbytes = self._commit(segment, buffers)
        finally:
            self._free.put(buffers)
        return SegmentDone(
            index, segment.n_sequences, nbytes, forward, waiting, time.perf_counter() - started
        )

    def stop(self) -> None:
        """Give up the forward that is running and those that wait; a segment being written is finished."""
        self._stopped.set()

    def close(self) -> None:
        """End the threads."""
        self._forward.shutdown(cancel_futures=True)
        self._writers.shutdown()

    def _compute(
        self, segment: Segment, tokens: NDArray[Any], buffers: SegmentBuffers
    ) -> tuple[float, float]:
        """Forward all batches of a segment; (seconds in it, seconds the model stood still before it)."""
        started = time.perf_counter()
        waiting = started - self._idle_since
        try:
            for start in range(0, segment.n_sequences, self._plan.request.batch_size):
                if self._stopped.is_set():
                    raise InterruptedRunError("the run was asked to stop")
                self._batch(tokens, start, buffers)
            buffers.finish()
        except ActstoreError:
            raise
        except Exception as error:
            raise ExtractError(
                f"segment {segment.index} (sequences {segment.start}:{segment.stop}) failed in the forward on "
                f"{self._device}: {error}" + _advice(error)
            ) from error
        self._idle_since = time.perf_counter()
        return self._idle_since - started, waiting

    def _batch(self, tokens: NDArray[Any], start: int, buffers: SegmentBuffers) -> None:
        import torch

        size = self._plan.request.batch_size
        rows = torch.from_numpy(tokens[start : start + size]).to(self._device, torch.int64)
        n_sequences = len(rows)
        if n_sequences < size:
            # Kernels choose their order of summation by shape: the last batch has the shape of all others.
            rows = torch.cat([rows, rows[-1:].expand(size - n_sequences, -1)])

        def take(hook: str, value: "torch.Tensor") -> None:
            # Stores have the position in front; patterns have heads there.
            point = point_of(hook)
            assert point is not None
            buffers.put(hook, start, n_sequences, value.movedim(point.position_axis, 1))

        self._model.run(rows, self._plan.hook_names, take)

    def _commit(self, segment: Segment, buffers: SegmentBuffers) -> int:
        """Write every hook's shard, then the record that makes them part of the store; bytes written."""
        rows = buffers.rows(segment)

        def write(hook: Any) -> ShardRecord:
            return put(self._blobs, encode(self._plan.activations(hook), segment.index, rows[hook.name]))

        writes = {hook.name: self._writers.submit(write, hook) for hook in self._plan.request.hooks}
        # All of them, also when one fails: the buffers must not be filled again while another is still reading.
        wait(writes.values())
        shards = {name: done.result() for name, done in writes.items()}
        record = CommitRecord(
            segment=segment.index,
            n_sequences=segment.n_sequences,
            shards=shards,
            environment=self._environment(),
        )
        # False: another worker was first. Its record names the same objects, for none is ever replaced.
        self._blobs.create(commit_key(segment.index), [record.to_bytes()])
        return sum(shard.nbytes for shard in shards.values())

    def _environment(self) -> Environment:
        import torch
        import transformers

        is_gpu = self._device.type == "cuda"
        return Environment(
            actstore=__version__,
            torch=str(torch.__version__),
            transformers=transformers.__version__,
            device=torch.cuda.get_device_name(self._device) if is_gpu else self._device.type,
            attention=self._model.attention,
        )


def _advice(error: Exception) -> str:
    is_memory = "out of memory" in str(error).lower() or isinstance(error, MemoryError)
    return "; choose a smaller batch_size and another out" if is_memory else ""
