"""Rendering chats in a process of its own, with bounds on time, memory and size."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Protocol, Self

from actstore.errors import TokensError
from actstore.tokens.chats.chat import Message
from actstore.tokens.chats.template import ChatTemplate

_PROGRAM: Final = Path(__file__).with_name("render_process.py")
MAX_SECONDS: Final = 20
"""Processor time in which a chat must be rendered."""
MAX_MEMORY_NBYTES: Final = 2 << 30
MAX_SIZE: Final = 64 << 20
"""The most characters of a rendered chat."""


class TemplateError(Exception):
    """The template refuses a chat, or fails."""


class Render(Protocol):
    """Renders messages as text.

    Raises:
        TemplateError: the template refuses them.
        TokensError: rendering goes beyond a bound.
    """

    def __call__(self, messages: Sequence[Message]) -> str: ...


class Renderer:
    """Renders chats by one template. It is a context manager, and a `Render`."""

    def __init__(
        self,
        template: ChatTemplate,
        *,
        max_seconds: int = MAX_SECONDS,
        max_memory_nbytes: int = MAX_MEMORY_NBYTES,
        max_size: int = MAX_SIZE,
    ) -> None:
        self._bounds = f"{max_seconds} s of processor time, {max_memory_nbytes >> 20} MiB of memory"
        self._max_size = max_size
        self._first = {
            "template": template.text,
            "tools": template.tools,
            "add_generation_prompt": template.add_generation_prompt,
            "arguments": {**template.special_tokens, **template.arguments},
            "max_seconds": max_seconds,
            "max_memory_nbytes": max_memory_nbytes,
            "max_size": max_size,
        }
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process. Another one is started when it is needed."""
        self._end()

    def _end(self) -> str:
        """End the process, and return the last line that it wrote about errors."""
        process, log, self._process, self._log = self._process, self._log, None, None
        if process is None or log is None:
            return ""
        process.kill()
        with process, log:
            with contextlib.suppress(BrokenPipeError):
                process.communicate()
            log.seek(0)
            return log.read()[-1000:].decode(errors="replace").strip().rpartition("\n")[2]

    def __call__(self, messages: Sequence[Message]) -> str:
        """Like `Render`."""
        try:
            line = json.dumps(list(messages))
        except (ValueError, TypeError, RecursionError) as error:
            raise TokensError(
                f"the messages hold a value that JSON does not have: {type(error).__name__}: {error}"
            ) from error
        reply = self._reply(line)
        if "text" in reply:
            return str(reply["text"])
        if "size" in reply:
            raise TokensError(
                f"the chat template makes {reply['size']:,} characters of it, and {self._max_size:,} are the most"
            )
        if "memory" in reply:
            raise TokensError(f"the chat template takes more than {self._bounds}")
        if "strftime_now" in str(self._first["template"]) and "not callable" in reply["error"]:
            raise TokensError(
                "the chat template writes today's date, and another day would give other tokens; fix it with "
                "chat_template_arguments, mostly date_string (--chat-template-arguments "
                '\'{"date_string": "26 Jul 2024"}\')'
            )
        raise TemplateError(reply["error"])

    def _reply(self, line: str) -> dict[str, Any]:
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply.endswith("\n"):
            last = self._end()
            why = f" (its last words were: {last})" if last else ""
            raise TokensError(
                f"the chat template takes more than {self._bounds}, at which its process was ended{why}"
            )
        parsed: dict[str, Any] = json.loads(reply)
        return parsed

    def _start(self) -> "subprocess.Popen[str]":
        # The same packages as here; threads of NumPy's would only take memory.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= {
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="ascii",
            env=environment,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._first) + "\n")
        return self._process
