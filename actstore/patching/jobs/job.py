"""The job: what a user asks for, in a YAML file or as arguments. Its schema is ``schemas/patchjob.schema.json``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from actstore.extraction.planning.execution_fields import Device, Executor, NumWorkers, RayAddress
from actstore.extraction.planning.job_file import read_fields
from actstore.extraction.planning.parsing import parsed

Text = Annotated[str, Field(min_length=1)]
MetricName = Literal["logit_difference", "logit", "log_probability", "probability"]


class PatchJob(BaseModel):
    """One grid for each pair of prompts. All but the last four fields decide the results."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), title="PatchJob"
    )

    model: Text = Field(description="Hugging Face Hub name, or the folder of a saved model.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="To compute in. Small effects drown in the noise of the others."
    )
    pairs: Text = Field(
        description="Pairs of prompts: path, glob or fsspec URL of .jsonl or .parquet files with clean, corrupted, "
        "answer and wrong, as text or token ids."
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Only the first pairs. Default: all.")
    prepend_bos: bool | None = Field(
        None, description="Begin text with the BOS token. Default: if the tokenizer has one."
    )
    hook: Text = Field(
        "resid_pre", description="What is patched: resid_pre, z, q, k, v, pattern, mlp_out, attn_out, ..."
    )
    axes: Annotated[tuple[Text, ...], Field(min_length=1)] | Text = Field(
        ("layer", "pos"),
        description="Axes of the grid: layer, then pos, head, dest_pos or src_pos; a list, or separated by commas.",
    )
    metric: MetricName = Field(
        "logit_difference",
        description="What is measured: the logit of answer minus that of wrong, or one of answer alone.",
    )
    positions: int | Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        -1, description="Position of the metric, from the end if negative; the mean over several."
    )
    max_tokens: Annotated[int, Field(ge=1)] = Field(
        32_768, description="Tokens on the way at once, which bounds memory."
    )
    part_size: Annotated[int, Field(ge=1)] = Field(
        32, description="Pairs in a part, the unit of work and of results."
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="CPU threads of a worker, which decide the last bits. Default: those of this machine, shared by "
        "its workers.",
    )
    out: Text = Field(description="Path or URL of the folder of results.")
    executor: Executor = "inline"
    num_workers: NumWorkers = None
    ray_address: RayAddress = None
    device: Device = None

    @property
    def axis_names(self) -> tuple[str, ...]:
        if isinstance(self.axes, str):
            return tuple(part.strip() for part in self.axes.split(","))
        return self.axes

    @property
    def measured_positions(self) -> tuple[int, ...]:
        return (self.positions,) if isinstance(self.positions, int) else self.positions


_EXPECTED: Final = {
    "axes": "should be names of axes, such as layer,pos: a list, or separated by commas",
    "positions": "should be an integer, or a list of integers",
}


def parse_job(fields: Mapping[str, Any], where: str = "job") -> PatchJob:
    """Make a job from its fields.

    Raises:
        JobError: a field is wrong; the message lists every problem with its location.
    """
    return parsed(PatchJob, fields, where, _EXPECTED)


def job_of(job: PatchJob | str | None, fields: Mapping[str, Any]) -> PatchJob:
    """The job that is meant by a job, or the path or URL of its file, and fields that take precedence.

    Raises:
        JobError: the file holds no job, or a field is wrong; the message lists every problem with its location.
        StorageError: the file cannot be read.
    """
    given = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    if isinstance(job, PatchJob):
        return parse_job(job.model_dump() | given) if given else job
    return parse_job(given) if job is None else parse_job(read_fields(str(job)) | given, str(job))
