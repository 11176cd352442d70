"""The job: what a user asks for, in a YAML file or as arguments."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from actstore.errors import JobError
from actstore.extraction.planning.job import column_names
from actstore.extraction.planning.job_file import read_fields
from actstore.extraction.planning.parsing import parsed

Text = Annotated[str, Field(min_length=1)]
SUFFIXES: Final = (".jsonl", ".parquet")
SAMPLING: Final = ("temperature", "top_p", "top_k", "max_new_tokens", "engine")
"""Fields that say what continuations are drawn by. They are columns of the file, too."""
COLUMNS: Final = (
    *("prompt", "completion", "messages", "input_ids", "roles", "turns", "n_prompt_tokens", "finish"),
    *("prompt_number", "sample", "seed", "model", "revision", *SAMPLING),
)
"""Columns of the file; ``messages`` only of chats."""


class GenerationJob(BaseModel):
    """Continuations of prompts. All but the last two fields decide what the file holds."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), title="GenerationJob"
    )

    model: Text = Field(description="Hugging Face Hub name, or the folder of a saved model.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="To compute in. Default: the dtype the model was saved in."
    )
    prompts: Text = Field(
        description="Text, chats or token ids: a path, glob or fsspec URL of .txt, .jsonl, .parquet or .arrow files, "
        "or hf:org/name[:config][:split]."
    )
    column: str | None = Field(
        None,
        description="Column of a table. Default: input_ids or tokens if there, else text, else messages.",
    )
    documents: Literal["file", "paragraph", "line"] = Field(
        "file", description="What one prompt is in a .txt file."
    )
    chat: bool | None = Field(
        None,
        description="Whether prompts are chats. Default: if there is a column messages, and none of text or ids.",
    )
    chat_template: Text | None = Field(
        None,
        description="Path or URL of a Jinja file that writes chats as text, or its text, if there is {{ or {% in it. "
        "Default: the tokenizer's template.",
    )
    tools: Text | tuple[dict[str, JsonValue], ...] | None = Field(
        None,
        description="Tools that every chat offers: path or URL of a JSON file with a list, or the list itself.",
    )
    chat_template_arguments: dict[str, JsonValue] | None = Field(
        None, description="Further arguments of the chat template, such as {enable_thinking: false}."
    )
    keep: tuple[Text, ...] | Text | None = Field(
        None,
        description="Columns of the prompts, such as labels, to repeat in the file beside each continuation: a list, "
        "or separated by commas. Default: none.",
    )
    n: Annotated[int, Field(ge=1, le=100_000)] = Field(1, description="Continuations of each prompt.")
    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = Field(
        128, description="The most tokens of a continuation."
    )
    temperature: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0, description="Of the logits. 0 takes the likeliest token each time."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the likeliest tokens that together have this probability."
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Sample from this many of the likeliest tokens. Default: all."
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = Field(
        0, description="Each continuation has a seed of its own, drawn from this one."
    )
    batch_size: Annotated[int, Field(ge=1, le=1 << 16)] = Field(
        8, description="Continuations in one batch, which is the unit of work that a killed run keeps."
    )
    engine: Literal["hf", "vllm"] = Field(
        "hf", description="hf: generation of Hugging Face. vllm: vLLM, where it is installed (extra vllm)."
    )
    out: Text = Field(description="The file to write, .jsonl or .parquet.")
    device: str | None = Field(
        None, description="Device of the model, such as cuda:0. Default: a GPU if any."
    )

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """Columns of the prompts to keep, each once."""
        return column_names(self.keep)

    @property
    def sampling(self) -> dict[str, Any]:
        """What the continuations are drawn by, as it is written beside each."""
        return {name: getattr(self, name) for name in SAMPLING}


_EXPECTED: Final = {
    "tools": "should be the path or URL of a JSON file, or a list of objects",
    "keep": "should be names of columns: a list, or separated by commas",
    "chat_template_arguments": 'should be an object, such as {"enable_thinking": false}',
}


def job_of(job: GenerationJob | str | None, fields: Mapping[str, Any]) -> GenerationJob:
    """The job that is meant by a job, or the path or URL of its file, and fields that take precedence.

    Raises:
        JobError: the file holds no job, or a field is wrong; the message lists every problem with its location.
        StorageError: the file cannot be read.
    """
    given = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    if isinstance(job, GenerationJob):
        parsed_job = parsed(GenerationJob, job.model_dump() | given, "job", _EXPECTED) if given else job
    elif job is None:
        parsed_job = parsed(GenerationJob, given, "job", _EXPECTED)
    else:
        parsed_job = parsed(GenerationJob, read_fields(str(job)) | given, str(job), _EXPECTED)
    if Path(parsed_job.out).suffix not in SUFFIXES:
        raise JobError(
            f"out is {parsed_job.out}; generated text is written to a file .jsonl or .parquet: name one"
        )
    taken = [name for name in parsed_job.kept_columns if name in COLUMNS]
    if taken:
        raise JobError(
            f"keep names {taken[0]}, and generated text has a column of its own of that name; rename the column of the "
            "prompts"
        )
    return parsed_job
