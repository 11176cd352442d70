"""Output whose reader may stop reading early, as ``head`` does, without ending the command."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Forgiving(io.FileIO):
    """A file that discards what is written once its reader is gone."""

    def write(self, data: Any, /) -> int:
        """Like `io.FileIO.write`, except that a closed pipe is no error."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


@contextlib.contextmanager
def may_leave() -> Iterator[None]:
    """Ignore that the reader of stdout or stderr stops reading. Otherwise click would end the command at that point
    with exit code 1, whatever its result.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(_forgiving(sys.stdout, stack)))
        stack.enter_context(contextlib.redirect_stderr(_forgiving(sys.stderr, stack)))
        yield


def _forgiving(stream: TextIO, stack: contextlib.ExitStack) -> TextIO:
    """A forgiving stream to the same file, or the stream itself if it has no file, as in tests."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError):
        return stream
    with contextlib.suppress(BrokenPipeError):
        stream.flush()
    forgiving = io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(descriptor, "wb", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering if isinstance(stream, io.TextIOWrapper) else False,
    )
    stack.callback(forgiving.flush)
    return forgiving
