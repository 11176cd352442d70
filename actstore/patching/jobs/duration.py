"""How long a job will take, measured on its first pairs."""

import time
from dataclasses import dataclass

from actstore.counted import counted
from actstore.extraction.planning.job_model import absolute_model
from actstore.patching.jobs.part import Figures, batches, patched
from actstore.patching.jobs.planning import PlannedPatching
from actstore.patching.jobs.worker import PatchSpec, loaded


@dataclass(frozen=True)
class JobEstimate:
    """What was measured, and what follows."""

    n_pairs: int
    """Pairs that were patched; their results are not kept."""
    seconds: float
    """Time that this took, without loading the model."""
    seconds_left: float
    """Time that one worker on this machine needs for all pairs that are not there yet."""
    engine: str
    noise_floor: float

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds_left), 60)
        pairs = counted(self.n_pairs, "pair")
        return (
            f"about {minutes} min {seconds} s with one worker on this machine ({pairs} took {self.seconds:.2f} s as "
            f"{self.engine}, noise floor {self.noise_floor:.1g})"
        )


def estimate_job(planned: PlannedPatching) -> JobEstimate:
    """Load the model, and patch some pairs of the first part that is missing.

    Raises:
        ModelError: the model cannot be loaded.
        PatchError, HookError: the grid cannot be computed.
    """
    plan, pairs, job = planned.plan, planned.pairs, planned.job
    lengths = pairs.lengths
    first = next(batches(plan.part((planned.pending or (0,))[0]), lengths))
    length = int(lengths[first[0]])
    # Beyond what is on the way at once, further pairs tell nothing new.
    batch = first[: max(1, 2 * plan.max_tokens // (planned.cells_of(length) * length))]
    model = loaded(PatchSpec(plan, pairs, absolute_model(job.model), job.revision, job.device))
    figures = Figures()
    started = time.perf_counter()
    patched(model, plan, pairs, batch, figures, lambda: None)
    seconds = time.perf_counter() - started

    def work(pair: int) -> int:
        """Tokens of all cells, to which time is proportional."""
        return planned.cells_of(int(lengths[pair])) * int(lengths[pair])

    left = sum(work(pair) for index in planned.pending for pair in plan.part(index))
    return JobEstimate(
        n_pairs=len(batch),
        seconds=seconds,
        seconds_left=seconds * left / sum(map(work, batch)),
        engine=next(iter(figures.engines)),
        noise_floor=figures.noise_floor,
    )
