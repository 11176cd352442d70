"""What a job says of chats: the template, and what it is given besides the messages."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from actstore.errors import JobError, StorageError
from actstore.reason import reason
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import ChatIdentity
from actstore.tokens.chats.template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELDS: Final = ("chat_template", "add_generation_prompt", "tools", "chat_template_arguments")
_IN_TEMPLATES: Final = ("{{", "{%")
"""What a template has that writes anything of a chat, and what paths and URLs do not have."""
_MAX_NBYTES: Final = 1 << 20
"""Largest file of a template or of tools. The largest templates of known models are a twentieth of it."""


class ChatSettings(Protocol):
    """The fields of a job that are about chats."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def tools(self) -> str | Sequence[Mapping[str, Any]] | None: ...
    @property
    def chat_template_arguments(self) -> Mapping[str, Any] | None: ...


def refuse_chat_settings(job: ChatSettings, source: str) -> None:
    """Check that a job over documents that are no chats, from this source, says nothing of chats.

    Raises:
        JobError: it does, and it would mean nothing.
    """
    given = [name for name in _FIELDS if getattr(job, name, None) not in (None, False)]
    if given:
        raise JobError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for chats, and {source} holds none: name a "
            "column with lists of messages (--column), or leave it out"
        )


def template_of(
    job: ChatSettings, tokenizer: "PreTrainedTokenizerBase", *, add_generation_prompt: bool
) -> ChatTemplate:
    """The template of a job over chats.

    Raises:
        JobError: a file that it names is too large, or is not what it should be.
        StorageError: a file cannot be read.
        TokensError: no template is given, and the tokenizer has none.
    """
    return ChatTemplate.of(
        tokenizer,
        None if job.chat_template is None else _template_text(job.chat_template),
        add_generation_prompt=add_generation_prompt,
        tools=_tools(job),
        arguments=job.chat_template_arguments,
    )


def identity_of(template: ChatTemplate) -> ChatIdentity:
    """What the plan says of a template."""
    return ChatIdentity(
        template_sha256=template.sha256,
        add_generation_prompt=template.add_generation_prompt,
        tools=None if template.tools is None else [dict(tool) for tool in template.tools],
        arguments=dict(template.arguments),
    )


def _template_text(given: str) -> str:
    """The template that a path or a URL leads to, or that is given itself."""
    if any(mark in given for mark in _IN_TEMPLATES):
        if len(given.encode(errors="surrogatepass")) > _MAX_NBYTES:
            raise JobError(
                f"chat_template has {len(given):,} characters, and {_MAX_NBYTES:,} bytes are the most"
            )
        return given
    data = _read(given, "chat_template")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobError(f"chat_template {given} is not UTF-8; give a text file") from error


def _tools(job: ChatSettings) -> list[dict[str, Any]] | None:
    if job.tools is None or not isinstance(job.tools, str):
        return None if job.tools is None else [dict(tool) for tool in job.tools]
    try:
        tools = json.loads(_read(job.tools, "tools"))
    except (ValueError, RecursionError) as error:
        raise JobError(f"tools {job.tools} is not JSON: {reason(error)}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise JobError(f"tools {job.tools} must hold a list of objects, as templates take them")
    return tools


def _read(url: str, field: str) -> bytes:
    folder, slash, name = url.rpartition("/")
    try:
        blobs = open_blobs(folder or slash or ".")
        info = blobs.head(name)
        if info is not None and info.nbytes > _MAX_NBYTES:
            raise JobError(f"{field} {url} has {info.nbytes:,} bytes, and {_MAX_NBYTES:,} are the most")
        return bytes(blobs.read(name, 0, None if info is None else info.nbytes))
    except StorageError as error:
        raise StorageError(f"{field} cannot be read: {error}") from error
