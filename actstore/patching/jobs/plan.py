"""The plan: everything that decides the results of a job. It is stored before any result, and never changed."""

from typing import Final, Literal

from pydantic import Field

from actstore.patching.jobs.job import MetricName
from actstore.store.format.document import Document

JOB: Final = "job.json"
"""Key of the plan."""
PAIRS: Final = "pairs.parquet"
"""Key of the pairs as token ids."""


class PatchedModel(Document):
    """The model that is patched."""

    name: str
    """Hub name, or the absolute path of the folder."""
    revision: str | None
    """The requested branch, tag or commit on the Hub. The fingerprint says which commit that was."""
    fingerprint: str
    """``hub:<commit>``, or ``crc32c:<config and weight files>`` for a folder."""
    model_type: str


class PatchPlan(Document):
    """What a job computes. Two jobs with equal plans have the same results."""

    format: Literal[1] = 1
    model: PatchedModel
    dtype: Literal["float32", "bfloat16", "float16"]
    source: str
    """Where the pairs were read from."""
    hook: str
    """The hook within its layer, such as ``hook_resid_pre``."""
    axes: tuple[str, ...]
    metric: MetricName
    positions: tuple[int, ...]
    max_tokens: int = Field(ge=1)
    part_size: int = Field(ge=1)
    """Pairs in a part; the last part may have fewer."""
    threads: int = Field(ge=1)
    """CPU threads of a worker: sums in another order differ in the last bits."""
    n_pairs: int = Field(ge=1)
    pairs_sha256: str
    """Digest of the token ids of all prompts, and of those answers that the metric reads."""

    @property
    def n_parts(self) -> int:
        return -(-self.n_pairs // self.part_size)

    def part(self, index: int) -> range:
        """The numbers of the pairs of a part."""
        return range(index * self.part_size, min((index + 1) * self.part_size, self.n_pairs))


def part_key(index: int) -> str:
    """The key of the results of a part."""
    return f"parts/{index:05}.parquet"


def differences(stored: PatchPlan, asked: PatchPlan) -> list[str]:
    """What makes two plans different, one sentence each. How the model and the file of pairs are called is nothing."""

    def fields(plan: PatchPlan) -> dict[str, object]:
        named = plan.model_dump(mode="json", exclude={"format", "source", "model"})
        return named | {"model": plan.model.fingerprint}

    there, here = fields(stored), fields(asked)
    return [
        f"{name} is {there[name]} there, {here[name]} was asked for"
        for name in here
        if there[name] != here[name]
    ]
