"""The job: what a user asks for, in a YAML file or as arguments. Its schema is ``schemas/job.schema.json``."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actstore.errors import JobError
from actstore.extraction.planning.job_file import read_fields
from actstore.reason import reason

SpecialToken = Annotated[int, Field(ge=0)] | Literal["bos", "eos", "sep", "pad", "none"] | None
PadToken = Annotated[int, Field(ge=0)] | Literal["bos", "eos", "sep", "pad"] | None
Text = Annotated[str, Field(min_length=1)]


class Job(BaseModel):
    """One extraction. All but the last six fields decide what the store holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=(), title="Job")

    model: Text = Field(description="Hugging Face Hub name, or the folder of a saved model.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    tokens: Text = Field(
        description="Text or token ids: a path, glob or fsspec URL of .txt, .jsonl, .parquet or .arrow files, "
        "or hf:org/name[:config][:split]."
    )
    column: str | None = Field(
        None, description="Column of a table. Default: input_ids or tokens if there, else text."
    )
    documents: Literal["file", "paragraph", "line"] = Field(
        "file", description="What one document is in a .txt file."
    )
    tokenizer: Text | None = Field(None, description="Hub name or folder. Default: the model's.")
    hooks: Annotated[tuple[Text, ...], Field(min_length=1)] | Text = Field(
        description="Hook names or globs, such as blocks.*.hook_resid_post: a list, or separated by commas."
    )
    context_length: Annotated[int, Field(ge=1)] = Field(description="Tokens in a stored sequence.")
    out: Text = Field(description="Path or URL of the store.")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="To compute and to store in. Default: the dtype the model was saved in."
    )
    packing: Literal["concat", "document"] = Field(
        "concat",
        description="concat: documents one after another, cut into full rows, as SAELens does. "
        "document: one document a row, truncated or padded.",
    )
    begin_batch_token: SpecialToken = Field(
        None, description="Token each row begins with. Default: bos for text, none for token ids."
    )
    begin_sequence_token: SpecialToken = Field(
        None, description="Token each document begins with. Default: none."
    )
    sequence_separator_token: SpecialToken = Field(
        None, description="Token between two documents of a row. Default: bos for text, none for token ids."
    )
    pad_token: PadToken = Field(
        None,
        description="Token that fills sequences of packing: document. Default: pad if there is one, else eos.",
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Stop after this many tokens, rounded down to whole sequences."
    )
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Sequences in one forward. Default: about 4,096 tokens."
    )
    segment_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Sequences in a unit of work and in a shard. Default: shards of about 64 MiB."
    )
    seed: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Store the sequences in an order drawn from this seed. Default: source order."
    )
    compression: Literal["lz4", "zstd"] | None = Field(
        None,
        description="Of activations: lz4 for speed, zstd for size. Default: none, so that any row is one read.",
    )
    covariance: bool = Field(
        False,
        description="Keep second moments in the statistics: d_model squared numbers a hook and segment.",
    )
    append: bool = Field(
        False, description="If the store is there and holds other tokens: add these as a further run."
    )
    strict: bool = Field(
        False,
        description="Compute a segment again rather than take over shards of an interrupted attempt that differ.",
    )
    executor: Text = Field("inline", description="inline (this process) or ray.")
    num_workers: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Workers of the ray executor. Default: one a GPU, or one if there is none."
    )
    ray_address: str | None = Field(
        None, description="Ray cluster to join, such as auto. Default: start one on this machine."
    )
    device: str | None = Field(None, description="Device of a worker, such as cuda:0. Default: a GPU if any.")

    @property
    def hook_patterns(self) -> tuple[str, ...]:
        if isinstance(self.hooks, str):
            return tuple(part.strip() for part in self.hooks.split(","))
        return self.hooks


def parse_job(fields: Mapping[str, Any], where: str = "job") -> Job:
    """Make a job from its fields.

    Raises:
        JobError: a field is wrong; the message lists every problem with its location.
    """
    try:
        # Through JSON, so that Python, YAML and the schema agree on what a list or an integer is.
        text = json.dumps(dict(fields), default=_not_json)
    except (ValueError, RecursionError, TypeError) as error:
        # A list inside of itself, or nested a thousand deep; a number of a million digits; a key that JSON lacks.
        raise JobError(f"{where} has a value that no field can have: {reason(error)}") from error
    try:
        return Job.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = list({problem["loc"][:1]: _problem(problem) for problem in problems}.values())
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise JobError(f"{where}: {count}: {'; '.join(lines)}") from error


def load_job(url: str, overrides: Mapping[str, Any] | None = None) -> Job:
    """Read a job from a YAML or JSON file.

    Args:
        url: path or fsspec URL of the file.
        overrides: fields that take precedence over the file's.

    Raises:
        JobError: the file holds no job, or a field is wrong; the message lists every problem with its location.
        StorageError: the file cannot be read.
    """
    return parse_job(read_fields(url) | dict(overrides or {}), where=url)


def _not_json(value: Any) -> dict[str, str]:
    """A value that no field accepts, in place of a type that JSON lacks (a date in YAML, a set in Python)."""
    return {type(value).__name__: str(value)}


_KINDS = {"missing": "is required", "extra_forbidden": "is not a field of a job"}


def _problem(problem: Any) -> str:
    """One line about a problem: the field, what is expected, and its value."""
    if not problem["loc"]:
        return reason(problem["msg"])
    field = str(problem["loc"][0])
    if problem["type"] in _KINDS:
        return f"{field}: {_KINDS[problem['type']]}"
    text = problem["msg"][0].lower() + problem["msg"][1:]
    # pydantic reports what each member of a union expects; this is one sentence for all.
    if field.endswith("_token"):
        names = (
            "'bos', 'eos', 'sep' or 'pad'" if field == "pad_token" else "'bos', 'eos', 'sep', 'pad' or 'none'"
        )
        text = f"should be a token id, {names}"
    elif field == "hooks":
        text = "should be hook names or globs: a list, or separated by commas"
    value = repr(problem["input"])
    return f"{field}: {text}, got {value if len(value) <= 80 else value[:77] + '...'}"
