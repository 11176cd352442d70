"""A chat template with all that it is given besides the messages."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actstore.errors import TokensError
from actstore.reason import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatTemplate:
    """How chats become text."""

    text: str
    """The Jinja template."""
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    """Special tokens of the tokenizer by name, which templates write, such as ``bos_token``."""
    add_generation_prompt: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    """Tools that every chat offers, as JSON schemas."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the template."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        text: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> "ChatTemplate":
        """The template of a tokenizer, or another one, filled in as ``tokenizer.apply_chat_template`` does.

        Args:
            tokenizer: the tokenizer, whose special tokens the template can write.
            text: a Jinja template; None for the tokenizer's own.
            add_generation_prompt: whether the text ends where the assistant's next message would begin.
            tools: tools that every chat offers.
            arguments: further arguments of the template.

        Raises:
            TokensError: the tokenizer has no template, or an argument would hide what the template is given anyway.
        """
        taken = {"messages", "tools", "documents", "add_generation_prompt"} & (arguments or {}).keys()
        if taken:
            raise TokensError(
                f"chat_template_arguments has {', '.join(sorted(taken))}, which a template gets anyway; leave it out"
            )
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if text is None:
            try:
                text = str(tokenizer.get_chat_template(None, None if tools is None else list(tools)))
            except ValueError as error:
                raise TokensError(
                    f"the tokenizer {name} has no chat template that fits: {reason(error)}; name a Jinja file with "
                    "chat_template (--chat-template)"
                ) from error
        special = {
            key: [str(one) for one in token] if isinstance(token, list) else str(token)
            for key, token in tokenizer.special_tokens_map.items()
        }
        return cls(text, special, add_generation_prompt, tools, arguments or {})
