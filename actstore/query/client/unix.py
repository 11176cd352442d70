"""Connects to servers at a Unix socket of this machine: ``http+unix://%2Frun%2Factstore.sock/v1/stores/name``."""

import http.client
import socket
from typing import Final
from urllib.parse import unquote, urlsplit

SCHEME: Final = "http+unix"


def is_unix(url: str) -> bool:
    """Whether a URL names a server at a Unix socket."""
    return url.startswith(f"{SCHEME}://")


def socket_path(url: str) -> str:
    """Path of the socket: the host of the URL, whose slashes are written as ``%2F``."""
    return unquote(urlsplit(url).netloc)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket: the same bytes with less work for the system than over TCP."""

    def __init__(self, path: str, timeout: float) -> None:
        """
        Args:
            path: path of the socket.
            timeout: seconds to connect and to wait for bytes.
        """
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Implements `http.client.HTTPConnection.connect`."""
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._path)
        except OSError as error:
            self.sock.close()
            if isinstance(error, FileNotFoundError):
                raise ConnectionRefusedError(error.errno, f"there is no socket {self._path}") from error
            raise
