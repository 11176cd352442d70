"""The access log: one line of JSON for each request."""

import datetime
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from actstore.errors import StorageError
from actstore.query.server.monitoring.lines import LineWriter
from actstore.reason import reason

_STDERR: Final = Path("-")
_MAX_PATH: Final = 1_000
"""Characters of a path at most; a line of a few kilobytes is written at once, even with several processes."""


class AccessLog:
    """Writes one line for each request. Lines are appended, so that several processes can share the file. Headers, and
    so tokens, are never in it; nor are queries, which can be texts of prompts. No request waits for a line to be
    written.
    """

    def __init__(self, path: Path, count_dropped: Callable[[int], None] | None = None) -> None:
        """
        Args:
            path: path of the file; ``-`` is stderr.
            count_dropped: called with the number of lines that could not be written.

        Raises:
            StorageError: the file cannot be written.
        """
        try:
            descriptor = (
                sys.stderr.fileno()
                if path == _STDERR
                else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            )
        except OSError as error:
            raise StorageError(
                f"the access log {path} cannot be written: {reason(error)}; choose another --access-log"
            ) from error
        self._writer = LineWriter(descriptor, _dropped_line, count_dropped)

    def close(self) -> None:
        """Wait a little for lines that are not written yet, and stop."""
        self._writer.close()

    def write(
        self, scope: Any, client: str, store: str | None, status: int | None, nbytes: int, seconds: float
    ) -> None:
        """Log one request.

        Args:
            scope: ASGI scope of the request.
            client: name of the token, or address of the client.
            store: store that was read; None if there was none.
            status: status of the reply; None if there was none.
            nbytes: bytes of the body of the reply that were sent.
            seconds: from the head of the request to the end of the reply.
        """
        self._write(client, scope["method"], scope["path"][:_MAX_PATH], store, status, nbytes, seconds)

    def write_refusal(self, client: str, status: int | None, seconds: float) -> None:
        """Log a connection that was refused before there was a request.

        Args:
            client: address of the client.
            status: status of the reply; None if the connection was closed without one.
            seconds: since the connection, or the request, was begun.
        """
        self._write(client, None, None, None, status, 0, seconds)

    def _write(
        self,
        client: str,
        method: str | None,
        path: str | None,
        store: str | None,
        status: int | None,
        nbytes: int,
        seconds: float,
    ) -> None:
        line = {
            "time": _now(),
            "client": client,
            "method": method,
            "path": path,
            "store": store,
            "status": status,
            "bytes": nbytes,
            "seconds": round(seconds, 4),
        }
        self._writer.write(json.dumps(line).encode() + b"\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _dropped_line(n_dropped: int) -> bytes:
    return json.dumps({"time": _now(), "dropped": n_dropped}).encode() + b"\n"
