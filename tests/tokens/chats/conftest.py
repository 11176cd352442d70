"""Rendering in this process, by transformers itself."""

from collections.abc import Callable
from typing import Any

import pytest

from actstore.tokens.chats.renderer import Render, TemplateError


@pytest.fixture(scope="session")
def rendering(tokenizer: Any) -> Callable[..., Render]:
    """Makes what renders messages by a template, with ``tokenizer.apply_chat_template``."""

    def with_template(template: str, **arguments: Any) -> Render:
        def render(messages: Any) -> str:
            try:
                return str(
                    tokenizer.apply_chat_template(
                        list(messages), chat_template=template, tokenize=False, **arguments
                    )
                )
            except Exception as error:
                raise TemplateError(str(error)) from error

        return render

    return with_template
