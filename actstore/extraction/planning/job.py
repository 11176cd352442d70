"""The job: what a user asks for, in a YAML file or as arguments. Its schema is ``schemas/job.schema.json``."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from actstore.errors import JobError
from actstore.extraction.planning.execution_fields import Device, Executor, NumWorkers, RayAddress
from actstore.extraction.planning.job_file import read_fields
from actstore.extraction.planning.parsing import parsed
from actstore.tokens.files import prompt_hint

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
        None,
        description="Column of a table. Default: input_ids or tokens if there, else text, else messages.",
    )
    chat: bool | None = Field(
        None,
        description="Whether documents are chats: lists of messages, each with role and content. "
        "Default: if there is a column messages, and none of text or token ids.",
    )
    chat_template: Text | None = Field(
        None,
        description="Path or URL of a Jinja file that writes chats as text, or its text, if there is {{ or {% in it. "
        "Default: the tokenizer's template.",
    )
    add_generation_prompt: bool = Field(
        False, description="End the text of a chat where the assistant's next message would begin."
    )
    tools: Text | tuple[dict[str, JsonValue], ...] | None = Field(
        None,
        description="Tools that every chat offers: path or URL of a JSON file with a list, or the list itself.",
    )
    chat_template_arguments: dict[str, JsonValue] | None = Field(
        None, description="Further arguments of the chat template, such as {enable_thinking: false}."
    )
    documents: Literal["file", "paragraph", "line"] = Field(
        "file", description="What one document is in a .txt file."
    )
    keep: tuple[Text, ...] | Text | None = Field(
        None,
        description="Columns of the source, such as labels, to keep beside the tokens, by document: a list, or "
        "separated by commas. Default: none.",
    )
    token_roles: bool = Field(
        False,
        description="Take the role and the message of each token from the columns roles and turns of a source of token "
        "ids, as actstore generate writes them.",
    )
    tokenizer: Text | None = Field(None, description="Hub name or folder. Default: the model's.")
    hooks: Annotated[tuple[Text, ...], Field(min_length=1)] | Text = Field(
        description="Hook names or globs, such as blocks.*.hook_resid_post: a list, or separated by commas."
    )
    context_length: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Tokens in a stored sequence; auto, of packing: document, is the longest document.",
    )
    out: Text = Field(description="Path or URL of the store.")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="To compute and to store in. Default: the dtype the model was saved in."
    )
    packing: Literal["concat", "document"] | None = Field(
        None,
        description="concat: documents one after another, cut into full rows, as SAELens does. "
        "document: one document a row, padded. Default: document for chats, else concat.",
    )
    truncate: Literal["left", "right"] | None = Field(
        None,
        description="Where packing: document cuts documents that are longer than a row. Default: they are refused.",
    )
    begin_batch_token: SpecialToken = Field(
        None, description="Token each row begins with. Default: bos for text, none for token ids."
    )
    begin_sequence_token: SpecialToken = Field(
        None, description="Token each document begins with. Default: none."
    )
    sequence_separator_token: SpecialToken = Field(
        None,
        description="Token between two documents of a row. Default: bos for text, none for token ids.",
    )
    pad_token: PadToken = Field(
        None,
        description="Token that fills sequences of packing: document. Default: pad if there is one, else eos.",
    )
    positions: Text = Field(
        "all",
        description="Positions whose activations are stored: all, last, last:K, A:B as Python slices the tokens of a "
        "sequence, every:K, sample:K, role:assistant, role:assistant:last, after:TEXT, or column:NAME.",
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Stop after this many tokens, rounded down to whole sequences."
    )
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Sequences in one forward. Default: a power of two, up to 4,096 tokens."
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
    executor: Executor = "inline"
    num_workers: NumWorkers = None
    ray_address: RayAddress = None
    device: Device = None

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """Columns to keep, each once."""
        return column_names(self.keep)

    @property
    def hook_patterns(self) -> tuple[str, ...]:
        return _parts(self.hooks) if isinstance(self.hooks, str) else self.hooks


def column_names(keep: Sequence[str] | str | None) -> tuple[str, ...]:
    """Names of columns, each once, of a list or of text with commas."""
    return tuple(dict.fromkeys(_parts(keep) if isinstance(keep, str) else keep or ()))


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


_LENGTH: Final = "should be a number of tokens, 1 or more, or 'auto'"
_SPECIAL: Final = "should be a token id, 'bos', 'eos', 'sep', 'pad' or 'none'"
_EXPECTED: Final = {
    **dict.fromkeys(("begin_batch_token", "begin_sequence_token", "sequence_separator_token"), _SPECIAL),
    "pad_token": "should be a token id, 'bos', 'eos', 'sep' or 'pad'",
    "context_length": _LENGTH,
    "tools": "should be the path or URL of a JSON file, or a list of objects",
    "chat_template_arguments": 'should be an object, such as {"enable_thinking": false}',
    "positions": "should be text such as last or '1:30', in quotes if it is numbers",
    "hooks": "should be hook names or globs: a list, or separated by commas",
    "keep": "should be names of columns: a list, or separated by commas",
}


def parse_job(fields: Mapping[str, Any], where: str = "job") -> Job:
    """Make a job from its fields.

    Raises:
        JobError: a field is wrong; the message lists every problem with its location.
    """
    job = parsed(Job, fields, where, _EXPECTED)
    if job.packing is not None:
        check_packing(job, where)
    return job


def check_packing(job: Job, where: str = "job") -> None:
    """Check the fields that need packing: document. It is called again once the source tells what the packing is.

    Raises:
        JobError: one of them is given, or one is missing, for packing: concat.
    """
    if job.packing == "concat" and job.context_length == "auto":
        raise JobError(
            f"{where}: 1 problem: context_length: is required, as packing: concat joins documents and cuts rows of "
            f"this many tokens from them{prompt_hint(job.tokens)}"
        )
    if job.packing == "concat" and job.truncate is not None:
        raise JobError(
            f"{where}: 1 problem: truncate: is for packing: document; packing: concat goes on with a document in "
            "the next row"
        )


def load_job(
    url: str, overrides: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None
) -> Job:
    """Read a job from a YAML or JSON file.

    Args:
        url: path or fsspec URL of the file.
        overrides: fields that take precedence over the file's.
        defaults: fields over which the file's take precedence.

    Raises:
        JobError: the file holds no job, or a field is wrong; the message lists every problem with its location.
        StorageError: the file cannot be read.
    """
    return parse_job(dict(defaults or {}) | read_fields(url) | dict(overrides or {}), where=url)
