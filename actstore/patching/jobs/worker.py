"""The worker, which computes one part at a time. Every executor uses it, as `actstore.extraction` says."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

from actstore.errors import ActstoreError, ExtractError, ModelError
from actstore.extraction.computing.heap import keep_large_blocks
from actstore.extraction.computing.interruptible import Interruptible, interruptible
from actstore.extraction.computing.worker import InterruptedRunError
from actstore.extraction.fingerprint import fingerprint
from actstore.hooks.loading.pretrained import chosen_device
from actstore.hooks.model import HookedModel
from actstore.patching.jobs.events import PartDone
from actstore.patching.jobs.pairs import Pairs
from actstore.patching.jobs.part import compute_part
from actstore.patching.jobs.plan import PatchPlan
from actstore.reason import reason


@dataclass(frozen=True)
class PatchSpec:
    """What a worker needs to start on any machine."""

    unit: ClassVar[str] = "part"
    """See `actstore.extraction.computing.executor.Spec`."""

    plan: PatchPlan
    pairs: Pairs
    model: str
    """Hub name or folder of the model on the machine of the worker; its weights must be those of the plan."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    device: str | None = None
    n_threads: int | None = None
    """CPU threads; None leaves torch's choice. For parts that are stored, it is that of the plan."""

    def start(self) -> "PatchWorker":
        return PatchWorker(self)


class PatchWorker:
    """Holds the model and computes parts. Calls of `run` from several threads take turns."""

    def __init__(self, spec: PatchSpec) -> None:
        """Load the model.

        Raises:
            ModelError: the model cannot be loaded, or its weights are not the planned ones.
        """
        import torch

        self._spec = spec
        self._threads_before = torch.get_num_threads()
        if spec.n_threads is not None:
            torch.set_num_threads(spec.n_threads)
        if chosen_device(spec.device).startswith("cpu"):
            keep_large_blocks()  # before the thread of the forward allocates anything
        # One thread loads and computes: torch would make a pool of threads for each thread that computes.
        self._forward = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._stopped = threading.Event()
        self._running: Interruptible[bytes] | None = None
        try:
            self._model = interruptible(self._forward, lambda: loaded(spec))
        except BaseException:
            self._forward.shutdown(wait=False)
            raise

    def run(self, index: int) -> PartDone:
        """Compute one part.

        Raises:
            ExtractError: it failed; the message names the part.
            InterruptedRunError: `stop` was called.
        """
        return self._forward.submit(lambda: self._compute(index)).result()

    def _compute(self, index: int) -> PartDone:
        plan, pairs = self._spec.plan, self._spec.pairs
        started = time.perf_counter()
        self._check_goes_on()
        self._running = Interruptible(
            lambda: compute_part(self._model, plan, pairs, index, self._check_goes_on)
        )
        try:
            data = self._running()
        except ActstoreError:
            raise
        except Exception as error:
            is_memory = "out of memory" in str(error).lower() or isinstance(error, MemoryError)
            advice = "; choose a smaller max_tokens and another out" if is_memory else ""
            raise ExtractError(
                f"part {index} failed on {self._model.device}: {reason(error)}{advice}"
            ) from error
        return PartDone(index, len(plan.part(index)), time.perf_counter() - started, data)

    def _check_goes_on(self) -> None:
        if self._stopped.is_set():
            raise InterruptedRunError("the run was asked to stop")

    def stop(self) -> None:
        """Give up the part that is computed, and those that wait."""
        self._stopped.set()
        if self._running is not None:
            self._running.interrupt()

    def close(self) -> None:
        """End the thread."""
        import torch

        self._forward.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads_before)


def loaded(spec: PatchSpec) -> HookedModel:
    """The model of a plan, loaded on this machine.

    Raises:
        ModelError: the model cannot be loaded, or its weights are not the planned ones.
    """
    planned, actual = spec.plan.model.fingerprint, fingerprint(spec.model, spec.revision)
    if actual != planned:
        raise ModelError(
            f"the weights of {spec.model} on this machine are {actual}, the job was planned with {planned}; use the "
            "same model files everywhere"
        )
    return HookedModel.from_pretrained(
        spec.model, dtype=spec.plan.dtype, device=spec.device, revision=spec.revision
    )
