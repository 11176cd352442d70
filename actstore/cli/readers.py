"""Output whose reader may leave before its end, as ``head`` does: the command goes on, and ends as it would have."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Forgiving(io.FileIO):
    """A file that takes what nobody reads any more."""

    def write(self, data: Any, /) -> int:
        """As `io.FileIO`, for which a pipe without a reader is an error."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


@contextlib.contextmanager
def may_leave() -> Iterator[None]:
    """Whoever reads stdout or stderr may leave meanwhile. Otherwise click would end the command where it is, with exit
    code 1, whatever it has found or was about to do.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(_forgiving(sys.stdout, stack)))
        stack.enter_context(contextlib.redirect_stderr(_forgiving(sys.stderr, stack)))
        yield


def _forgiving(stream: TextIO, stack: contextlib.ExitStack) -> TextIO:
    """The same file; the stream itself where it is none, as in tests."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError):
        return stream
    with contextlib.suppress(BrokenPipeError):
        stream.flush()
    found = io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(descriptor, "wb", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering if isinstance(stream, io.TextIOWrapper) else False,
    )
    stack.callback(found.flush)
    return found
