"""Generating: prompts in, a file of continuations out. It may be killed at any point, and then goes on."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from actstore.counted import counted
from actstore.errors import JobError
from actstore.extraction.computing.executor import Resources
from actstore.extraction.fingerprint import fingerprint
from actstore.extraction.planning.devices import check_device
from actstore.extraction.report import table
from actstore.generating.engine import Continuation, Engine
from actstore.generating.job import GenerationJob, job_of
from actstore.generating.parts import Parts
from actstore.generating.prompts import Prompt, read_prompts, sha256_of
from actstore.hooks.loading.embedding_rows import embedding_rows
from actstore.hooks.loading.pretrained import load_config
from actstore.tokens import load_tokenizer
from actstore.tokens.chats.chat import NO_TURN, ROLES, TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASSISTANT: Final = ROLES["assistant"]
IN_MEMORY: Final = "prompts in memory"
"""What stands for the source of prompts that Python gave."""


@dataclass(frozen=True)
class PartDone:
    """A batch of continuations is stored."""

    part: int
    n_continuations: int
    n_tokens: int
    """New tokens."""
    seconds: float
    n_pending: int
    """Continuations that were to be made by this call, these included."""


@dataclass(frozen=True)
class GenerationReport:
    """Result of `generate`; print it for a table."""

    out: str
    n_prompts: int
    n_continuations: int
    n_continuations_made: int
    """Continuations that this call made."""
    n_tokens_made: int
    """New tokens that this call made."""
    longest: int
    """Tokens of the longest prompt with max_new_tokens."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return table(
            {
                "file": self.out,
                "text": f"{counted(self.n_continuations, 'continuation')} of {counted(self.n_prompts, 'prompt')}",
                "made": f"{counted(self.n_continuations_made, 'continuation')}, "
                f"{counted(self.n_tokens_made, 'token')} in {self.seconds:,.1f} s",
            }
        )


def generate(
    job: GenerationJob | str | None = None,
    *,
    on_event: Callable[[PartDone], None] | None = None,
    given: Any = None,
    **fields: Any,
) -> GenerationReport:
    """Continue prompts, and write the continuations with their tokens, roles and seeds to a file.

    The same call goes on after it was killed, and ends in the same file: a continuation depends on its prompt, its
    number and the seed, not on the others of its batch, but for rounding; batches are always the same.

    Args:
        job: a job, or the path or URL of a YAML file; None if all fields are given as keywords.
        on_event: called with each event of progress.
        given: prompts in memory, instead of the field ``prompts``: texts, token ids, chats or a table, as
            `actstore.extract` takes them.
        fields: fields of a job, which take precedence over those of the file.

    Raises:
        JobError, ModelError, TokensError, StorageError: something is wrong; the message says what.
        PlanMismatchError: the file was begun by another job; the differences are named.
    """
    started = time.perf_counter()
    job = job_of(job, fields if given is None else fields | {"prompts": IN_MEMORY})
    check_device(job.device, "inline", Resources(None, None))
    tokenizer = load_tokenizer(job.model, job.revision)
    config = load_config(job.model, revision=job.revision)
    prompts = read_prompts(job, tokenizer, given, n_embeddings=embedding_rows(config, job.model))
    longest = max(len(prompt.ids) for prompt in prompts) + job.max_new_tokens
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise JobError(
            f"the longest prompt and max_new_tokens {job.max_new_tokens} are {longest} tokens, and {job.model} has "
            f"{positions} positions; choose fewer, or shorten the prompt"
        )
    n = len(prompts) * job.n
    plan = {
        "format": 2,  # 1 had no turns
        "model": fingerprint(job.model, job.revision),
        "dtype": job.dtype,
        "prompts_sha256": sha256_of(prompts),
        "keep": list(job.kept_columns),
        "n": job.n,
        "seed": job.seed,
        "batch_size": job.batch_size,
        **job.sampling,
    }
    parts = Parts(job.out, plan, -(-n // job.batch_size))
    pending = parts.pending
    n_pending = sum(len(range(n)[part * job.batch_size :][: job.batch_size]) for part in pending)
    engine = _engine(job, tokenizer) if pending else None
    n_tokens = 0
    for part in pending:
        assert engine is not None
        begun = time.perf_counter()
        rows = list(
            _rows(job, tokenizer, prompts, range(n)[part * job.batch_size :][: job.batch_size], engine)
        )
        parts.write(part, rows)
        n_new = sum(len(row["input_ids"]) - row["n_prompt_tokens"] for row in rows)
        n_tokens += n_new
        if on_event is not None:
            on_event(PartDone(part, len(rows), n_new, time.perf_counter() - begun, n_pending))
    parts.join()
    seconds = time.perf_counter() - started
    return GenerationReport(job.out, len(prompts), n, n_pending, n_tokens, longest, seconds)


def seed_of(seed: int, prompt: int, sample: int) -> int:
    """The seed of one continuation, below 2^63: the first 63 bits of the SHA-256 of ``seed/prompt/sample``."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _engine(job: GenerationJob, tokenizer: "PreTrainedTokenizerBase") -> Engine:
    if job.engine == "vllm":
        from actstore.generating.vllm import VllmEngine

        return VllmEngine(job)
    from actstore.generating.hugging_face import HuggingFaceEngine

    return HuggingFaceEngine(job, tokenizer)


def _rows(
    job: GenerationJob,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    numbers: range,
    engine: Engine,
) -> Iterator[dict[str, Any]]:
    """The rows of the file with these numbers: prompt by prompt, and of each its samples."""
    places = [divmod(number, job.n) for number in numbers]
    seeds = [seed_of(job.seed, *place) for place in places]
    made = engine([prompts[prompt].ids for prompt, _ in places], seeds)
    for (prompt, sample), seed, continuation in zip(places, seeds, made, strict=True):
        row = _row(tokenizer, prompts[prompt], continuation)
        model = {"model": job.model, "revision": job.revision}
        place = {"prompt_number": prompt, "sample": sample, "seed": seed}
        yield row | place | model | job.sampling | dict(prompts[prompt].columns)


def _row(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, continuation: Continuation) -> dict[str, Any]:
    text = str(tokenizer.decode(continuation.ids, skip_special_tokens=True))
    roles = np.full(len(continuation.ids), _ASSISTANT, np.int8)
    turns = np.full(len(continuation.ids), prompt.next_turn, np.int32)
    if continuation.finish == "stop":
        # The token that ends a message belongs to no message, as in a chat that is rendered.
        roles[-1:], turns[-1:] = TEMPLATE, NO_TURN
    shown = prompt.text if prompt.text is not None else str(tokenizer.decode(prompt.ids))
    row: dict[str, Any] = {"prompt": shown, "completion": text}
    if prompt.messages is not None:
        row["messages"] = [*prompt.messages, {"role": "assistant", "content": text}]
    return row | {
        "input_ids": [*prompt.ids.tolist(), *continuation.ids.tolist()],
        "roles": [*prompt.roles.tolist(), *roles.tolist()],
        "turns": [*prompt.turns.tolist(), *turns.tolist()],
        "n_prompt_tokens": len(prompt.ids),
        "finish": continuation.finish,
    }
