"""Prompts as token ids, each with its text or messages and the role of each token."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import TokensError
from actstore.extraction.planning.tokenising.chat_settings import refuse_chat_settings, template_of
from actstore.generating.job import GenerationJob
from actstore.tokens import Source, chats_of, open_source, token_documents
from actstore.tokens.batch import TokenIds
from actstore.tokens.chats.chat import ROLES, Message
from actstore.tokens.chats.listed import ChatList
from actstore.tokens.chats.renderer import Renderer
from actstore.tokens.chats.token_roles import chat_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Given = Sequence[str] | Sequence[Sequence[Mapping[str, Any]]]
"""Prompts in memory: texts, or chats."""
_USER: Final = ROLES["user"]


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    ids: TokenIds
    """[n_tokens]"""
    roles: NDArray[np.int8]
    """[n_tokens]; text and ids are the user's."""
    text: str | None
    """The text as it was given; None for chats and ids."""
    messages: tuple[Message, ...] | None
    """The messages of a chat; None for text and ids."""


def read_prompts(
    job: GenerationJob, tokenizer: "PreTrainedTokenizerBase", given: Given | None, *, n_embeddings: int
) -> list[Prompt]:
    """All prompts of a job.

    Args:
        job: the job.
        tokenizer: tokenizer of the model.
        given: prompts in memory, which are then used instead of the job's.
        n_embeddings: number of ids that the model has embeddings for.

    Raises:
        JobError, StorageError: a chat template or tools cannot be read, or are for no chats.
        TokensError: the prompts cannot be read or rendered; there are none, or one of them is empty, or has an id that
            the model does not have.
    """
    prompts = list(_prompts(job, tokenizer, given))
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
    """SHA-256 of all token ids, each prompt behind its length."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.array(len(prompt.ids), "<i8").tobytes())
        digest.update(np.ascontiguousarray(prompt.ids, "<i4").tobytes())
    return digest.hexdigest()


def _prompts(
    job: GenerationJob, tokenizer: "PreTrainedTokenizerBase", given: Given | None
) -> Iterator[Prompt]:
    if given is not None and all(isinstance(one, str) for one in given):
        refuse_chat_settings(job, job.prompts)
        yield from (_of_text(tokenizer, str(text)) for text in given)
        return
    source: Source = (
        ChatList(given)  # type: ignore[arg-type]
        if given is not None
        else open_source(job.prompts, column=job.column, documents=job.documents, chat=job.chat)
    )
    if source.kind == "chats":
        with Renderer(template_of(job, tokenizer, add_generation_prompt=True)) as render:
            for first, chats in chats_of(source):
                for chat, tokens in zip(chats, chat_tokens(chats, first, tokenizer, render), strict=True):
                    yield Prompt(tokens.ids, tokens.roles, None, chat.messages)
        return
    refuse_chat_settings(job, job.prompts)
    if source.kind == "text":
        for _, texts in source.batches():
            yield from (_of_text(tokenizer, str(text)) for text in texts)
    else:
        for _, ids in token_documents(source):
            yield Prompt(ids, np.full(len(ids), _USER, np.int8), None, None)


def _of_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> Prompt:
    """A text with the special tokens that its tokenizer puts around it by itself, as `generate` is mostly called."""
    ids = np.array(tokenizer(text)["input_ids"], np.int32)
    return Prompt(ids, np.full(len(ids), _USER, np.int8), text, None)
