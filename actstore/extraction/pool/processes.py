"""The process executor: a pool of worker processes on this machine, one for each GPU, without Ray."""

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from actstore.errors import ExtractError, JobError
from actstore.extraction.computing.executor import Done, Resources, Spec
from actstore.extraction.pool.fleet import Call, WorkerLostError, WorkerRaisedError
from actstore.extraction.pool.pool import Pool
from actstore.extraction.pool.worker_process import serve
from actstore.reason import reason


def workers_here(resources: Resources) -> int:
    """See `actstore.extraction.computing.executor.workers_here`."""
    return resources.num_workers or max(1, _n_gpus())


def run(
    spec: Spec[Done],
    pending: Sequence[int],
    resources: Resources,
    on_done: Callable[[Done], None],
) -> None:
    """Compute all pending units in processes of this machine; see `Executor`.

    Without a number of workers there is one for each GPU, and one on a machine without any. Workers on a CPU share its
    cores.
    """
    fleet = ProcessFleet(spec, min(workers_here(resources), len(pending)))
    try:
        Pool(fleet, spec.unit, pending, on_done).run()
    finally:
        fleet.close()


def _n_gpus() -> int:
    import torch

    return torch.cuda.device_count()


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    gpu: int | None
    calls: "dict[int, _PendingCall]"
    """Calls without an answer, by number."""
    loss: WorkerLostError | None = None


@dataclass(eq=False)
class _PendingCall:
    worker: _Worker
    number: int
    result: Any = None
    error: Exception | None = None
    has_ended: bool = False


class ProcessFleet:
    """Workers that are processes of this machine; see `actstore.extraction.pool.fleet.Fleet`."""

    def __init__(self, spec: Spec[Any], num_workers: int) -> None:
        self._num_workers = num_workers
        wants_gpu = (spec.device or "cuda").startswith("cuda")
        self._n_gpus = _n_gpus() if wants_gpu else 0
        if not self._n_gpus and spec.n_threads is None:
            n_cores = len(os.sched_getaffinity(0))
            spec = dataclasses.replace(spec, n_threads=max(1, n_cores // num_workers))
        elif self._n_gpus and spec.device is not None:
            spec = dataclasses.replace(spec, device="cuda")  # each worker sees one GPU
        self._spec = spec
        # A fork would copy threads of torch and the state of CUDA, of which neither works in the copy.
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._n_calls = 0

    def size(self) -> int:
        """The number that was asked for."""
        return self._num_workers

    def add(self) -> _Worker:
        """Start a process, on the GPU that has the fewest workers."""
        gpu = None
        if self._n_gpus:
            on_gpu = [sum(worker.gpu == i for worker in self._workers) for i in range(self._n_gpus)]
            gpu = on_gpu.index(min(on_gpu))
        ours, theirs = self._context.Pipe()
        environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": _visible(gpu)}
        process = self._context.Process(
            target=serve, args=(theirs, environment, self._spec), name="actstore-worker", daemon=True
        )
        try:
            process.start()
        except OSError:
            raise
        except Exception as error:  # whatever pickling raises
            raise JobError(
                f"a {self._spec.unit} cannot be given to other processes: {reason(error)}; define what is given at the "
                "top of a module that they can import, or choose executor: inline"
            ) from error
        theirs.close()
        worker = _Worker(process, ours, gpu, {})
        self._workers.append(worker)
        return worker

    def call(self, worker: _Worker, call: Call) -> _PendingCall:
        """Send the call through the pipe."""
        self._n_calls += 1
        pending = _PendingCall(worker, self._n_calls)
        worker.calls[pending.number] = pending
        try:
            worker.pipe.send((pending.number, call))
        except OSError:
            self._lose(worker)
        return pending

    def ended(self, calls: Collection[_PendingCall], timeout: float) -> list[_PendingCall]:
        """Take what has come from the pipes of these calls."""
        ended = [call for call in calls if call.has_ended]
        if ended:
            return ended
        workers = {call.worker.pipe: call.worker for call in calls}
        for pipe in wait(list(workers), timeout):
            assert isinstance(pipe, Connection)
            self._receive(workers[pipe])
        return [call for call in calls if call.has_ended]

    def _receive(self, worker: _Worker) -> None:
        """Take one answer; the pipe of a process that has died is at its end."""
        try:
            number, result, error = worker.pipe.recv()
        except (EOFError, OSError):
            self._lose(worker)
            return
        call = worker.calls.pop(number)
        call.result, call.error, call.has_ended = result, error, True

    def _lose(self, worker: _Worker) -> None:
        worker.process.join(1.0)
        code = worker.process.exitcode
        how = (
            "ended"
            if code is None
            else f"was ended by signal {-code}"
            if code < 0
            else f"ended with code {code}"
        )
        worker.loss = WorkerLostError(ExtractError(f"process {worker.process.pid} {how}"))
        for call in worker.calls.values():
            call.error, call.has_ended = worker.loss, True
        worker.calls.clear()

    def result(self, call: _PendingCall) -> Any:
        """See `Fleet.result`."""
        if isinstance(call.error, WorkerLostError):
            raise call.error
        if call.error is not None:
            raise WorkerRaisedError(call.error)
        return call.result

    def remove(self, worker: _Worker) -> None:
        """Kill the process."""
        if worker in self._workers:
            self._workers.remove(worker)
            worker.process.kill()
            worker.process.join()
            self._lose(worker)
            worker.pipe.close()

    def close(self) -> None:
        """Kill what is left."""
        for worker in list(self._workers):
            self.remove(worker)

    def wanting(self) -> str:
        """See `Fleet.wanting`."""
        return "their processes to start"


def _visible(gpu: int) -> str:
    """The GPU of this number, of those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(gpu) if not visible else visible.split(",")[gpu].strip()
