"""Prompts as token ids, each with its text or messages and the role of each token."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import TokensError
from actstore.extraction.planning.tokenising.chat_settings import refuse_chat_settings, template_of
from actstore.generating.job import GenerationJob
from actstore.generating.prompt_columns import PromptColumns
from actstore.tokens import Source, chats_of, open_memory, open_source, token_documents
from actstore.tokens.batch import TokenIds
from actstore.tokens.chats.chat import ROLES, Message
from actstore.tokens.chats.renderer import Renderer
from actstore.tokens.chats.token_roles import chat_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER: Final = ROLES["user"]


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    ids: TokenIds
    """[n_tokens]"""
    roles: NDArray[np.int8]
    """[n_tokens]; text and ids are the user's."""
    turns: NDArray[np.int32]
    """Number of the message of each token, [n_tokens]; text and ids are message 0."""
    text: str | None
    """The text as it was given; None for chats and ids."""
    messages: tuple[Message, ...] | None
    """The messages of a chat; None for text and ids."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Values of the kept columns, by name."""

    @property
    def next_turn(self) -> int:
        """Number of the message that a continuation is."""
        return 1 if self.messages is None else len(self.messages)


def read_prompts(
    job: GenerationJob, tokenizer: "PreTrainedTokenizerBase", given: Any, *, n_embeddings: int
) -> list[Prompt]:
    """All prompts of a job.

    Args:
        job: the job.
        tokenizer: tokenizer of the model.
        given: prompts in memory, as `open_memory` takes them, which are then used instead of the job's; or None.
        n_embeddings: number of ids that the model has embeddings for.

    Raises:
        JobError, StorageError: a chat template or tools cannot be read, or are for no chats.
        TokensError: the prompts cannot be read or rendered; there are none, or one of them is empty, or has an id that
            the model does not have; a column to keep is missing, or has values that JSON does not have.
    """
    source: Source = (
        open_source(
            job.prompts, column=job.column, documents=job.documents, keep=job.kept_columns, chat=job.chat
        )
        if given is None
        else open_memory(given, column=job.column).keeping(job.kept_columns)
    )
    columns = PromptColumns(job.kept_columns) if job.kept_columns else None
    prompts = list(_prompts(job, tokenizer, source, columns))
    if not prompts:
        raise TokensError(f"{job.prompts} holds no prompts; give one at least")
    for number, prompt in enumerate(prompts):
        if not len(prompt.ids):
            raise TokensError(f"prompt {number} of {job.prompts} is empty; leave it out, or give it a token")
        if prompt.ids.min() < 0 or prompt.ids.max() >= n_embeddings:
            raise TokensError(
                f"prompt {number} of {job.prompts} has token ids from {prompt.ids.min()} to {prompt.ids.max()}, and "
                f"{job.model} has embeddings for 0 to {n_embeddings - 1}; use the model that they were made for"
            )
    return prompts


def sha256_of(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of all prompts: token ids, each behind their number, text or messages, and the columns that are kept."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.array(len(prompt.ids), "<i8").tobytes())
        digest.update(np.ascontiguousarray(prompt.ids, "<i4").tobytes())
        # Other texts can have the same ids, and the file repeats them.
        digest.update(json.dumps([prompt.text, prompt.messages, prompt.columns]).encode() + b"\0")
    return digest.hexdigest()


def _prompts(
    job: GenerationJob,
    tokenizer: "PreTrainedTokenizerBase",
    source: Source,
    columns: PromptColumns | None,
) -> Iterator[Prompt]:
    prompts = _read(job, tokenizer, source, columns)
    if columns is None:
        yield from prompts
        return
    for number, prompt in enumerate(prompts):
        yield replace(prompt, columns=columns.rows[number])


def _read(
    job: GenerationJob,
    tokenizer: "PreTrainedTokenizerBase",
    source: Source,
    columns: PromptColumns | None,
) -> Iterator[Prompt]:
    """The prompts without their columns, which are in ``columns`` before each is given."""
    if source.kind == "chats":
        with Renderer(template_of(job, tokenizer, add_generation_prompt=True)) as render:
            for first, chats in chats_of(source, columns):
                for chat, tokens in zip(chats, chat_tokens(chats, first, tokenizer, render), strict=True):
                    yield Prompt(tokens.ids, tokens.roles, tokens.turns, None, chat.messages)
        return
    refuse_chat_settings(job, job.prompts)
    if source.kind == "text":
        for _, texts in source.batches(columns):
            for text in texts:
                # With the special tokens that the tokenizer puts around a text by itself, as `generate` is mostly
                # called.
                yield _of_user(np.array(tokenizer(str(text))["input_ids"], np.int32), str(text))
    else:
        for _, ids in token_documents(source, kept=columns):
            yield _of_user(ids, None)


def _of_user(ids: TokenIds, text: str | None) -> Prompt:
    """Text or ids, which are all one message of the user."""
    n = len(ids)
    return Prompt(ids, np.full(n, _USER, np.int8), np.zeros(n, np.int32), text, None)
