"""The job of ``actstore probe``: what a user asks for, in a YAML file or as options."""

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from actstore.analysis.probes.probe import Kind
from actstore.extraction.planning.execution_fields import Executor, NumWorkers, RayAddress
from actstore.extraction.planning.parsing import parsed

Text = Annotated[str, Field(min_length=1)]


class ProbeJob(BaseModel):
    """Probes of one store. Fields are those of `fit_probe`, and where the results go."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), title="ProbeJob"
    )

    store: Text
    hook: Text | Annotated[tuple[Text, ...], Field(min_length=1)]
    labels: Text
    kind: Kind = "logistic"
    l2: Annotated[tuple[float, ...], Field(min_length=1)] | float | None = None
    held_out: float = 0.2
    groups: Text | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    standardise: bool = True
    curve: tuple[float, ...] | None = None
    n_bootstrap: Annotated[int, Field(ge=0)] = 1000
    memory: Annotated[int, Field(ge=1)] | None = None
    drop: tuple[Text | int, ...] = ()
    resume: Text | None = None
    executor: Executor = "inline"
    num_workers: NumWorkers = None
    ray_address: RayAddress = None
    out: Text | None = None
    plot: Text | None = None
    save: Text | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `fit_probe`, without the store, the hooks and the labels."""
        fields = self.model_dump(exclude={"store", "hook", "labels", "out", "plot", "save"})
        return {name: value for name, value in fields.items() if value is not None}


_EXPECTED: Final = {
    "hook": "should be a name or a glob of hooks, or a list of these",
    "l2": "should be a number, or a list of numbers",
    "curve": "should be a list of numbers",
    "drop": "should be a list of names such as bos, or token ids",
}


def parse_job(fields: dict[str, Any], where: str) -> ProbeJob:
    """Make a job from its fields.

    Raises:
        JobError: a field is wrong; the message lists every problem with its location.
    """
    return parsed(ProbeJob, fields, where, _EXPECTED)
