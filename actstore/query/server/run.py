"""Running the server: its socket, its processes, what they share, and its end."""

import contextlib
import functools
import ipaddress
import json
import multiprocessing
import os
import signal
import socket
import ssl
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from actstore.errors import JobError, StorageError
from actstore.query.problem import Problem
from actstore.query.server.settings import MULTIPROCESS, Settings
from actstore.query.wire import PROBLEM

if TYPE_CHECKING:
    from actstore.query.server.gate import Gate

_KEEP_ALIVE_S: Final = 75
"""For idle connections, which clients keep in a pool."""
_DRAIN_S: Final = 30
"""For what is in flight when the server is told to end."""
_BACKLOG: Final = 2048
_MAX_HEAD: Final = 1 << 20
"""Bytes that may come before the end of the headers; what is read at once may have a part of the body in it."""


@dataclass(frozen=True)
class Listening:
    """Where, and with how many processes."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes one that is free."""
    workers: int = 1
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    verbose: bool = False
    """Also log each request."""


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(listening: Listening, settings: Settings) -> socket.socket:
    """The socket of a server, shared by its processes.

    Raises:
        JobError: it would be open to everybody, or its certificate cannot be used.
        StorageError: the address cannot be had.
    """
    host, port = listening.host, listening.port
    if settings.token_file is None and not is_loopback(host):
        raise JobError(
            f"{host} can be reached from elsewhere, so everybody could read the stores; give --token-file, or stay on "
            "127.0.0.1"
        )
    _check_certificate(listening)
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Inherited by connections: one whose client takes nothing is ended by the system, with what waits for it.
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.stall_s))
        found.bind((host, port))
        found.listen(_BACKLOG)  # who comes before the processes are up waits for them
    except OSError as error:
        found.close()
        raise StorageError(
            f"{host}:{port} cannot be listened at: {error.strerror}; choose another --port, or 0 for a free one"
        ) from error
    return found


def _check_certificate(listening: Listening) -> None:
    path, key = listening.ssl_certfile, listening.ssl_keyfile
    if path is None:
        if key is not None:
            raise JobError("--ssl-keyfile is the key of a certificate; give that with --ssl-certfile")
        return
    try:
        # A key with a password is refused, rather than asked for.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(path, key, password="")
    except OSError as error:
        raise JobError(
            f"the certificate {path} cannot be used with the key {key or path}: {error.strerror or error}; give PEM "
            "files, and a key without a password"
        ) from error


def url_of(listening: Listening, bound: socket.socket) -> str:
    """What clients type."""
    scheme = "http" if listening.ssl_certfile is None else "https"
    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    return f"{scheme}://{host}:{bound.getsockname()[1]}"


@contextlib.contextmanager
def shared(settings: Settings) -> Iterator[Settings]:
    """Folders that all processes use, removed at the end: counters, and the cache if the user named none."""
    with contextlib.ExitStack() as stack:
        counters = stack.enter_context(tempfile.TemporaryDirectory(prefix="actstore-metrics-"))
        os.environ[MULTIPROCESS] = counters
        stack.callback(os.environ.pop, MULTIPROCESS, None)
        if settings.cache_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="actstore-shards-")))
            settings = replace(settings, cache_dir=folder)
        if settings.cache_limit is None:
            assert settings.cache_dir is not None
            settings = replace(settings, cache_limit=_half_of_free(settings.cache_dir))
        yield settings


def _half_of_free(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    status = os.statvfs(folder)
    return max(1, status.f_bavail * status.f_frsize // 2)


def serve(settings: Settings, listening: Listening, at: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; what is in flight then is finished.

    Raises:
        JobError: the token file is not as it should be.
        StorageError: the root cannot be opened.
    """
    config = uvicorn.Config(
        functools.partial(_application, settings),
        factory=True,
        workers=listening.workers,
        http=_Protocol,
        ws="none",
        loop="uvloop",
        log_config=_log_config(listening.verbose),
        access_log=listening.verbose,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_DRAIN_S,
        ssl_certfile=listening.ssl_certfile,
        ssl_keyfile=listening.ssl_keyfile,
    )
    # uvicorn ends by raising the signal again, which is not an error here.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    if listening.workers > 1:
        Multiprocess(config, [at]).run()
    else:
        uvicorn.Server(config).run([at])


class _Protocol(HttpToolsProtocol):
    """That of uvicorn, with a limit of what comes before a body, and a problem for what is no HTTP."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._n_head: int | None = 0

    def data_received(self, data: bytes) -> None:
        """As asyncio has it; the parser would keep lines and headers of any length."""
        if self._n_head is not None:
            self._n_head += len(data)
            if self._n_head > _MAX_HEAD:
                self.send_400_response("too long")
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """As httptools has it."""
        self._n_head = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """As httptools has it."""
        self._n_head = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """As uvicorn has it."""
        del msg
        problem = Problem(400, "invalid", "this is no HTTP, or the URL is too long")
        body = json.dumps(problem.document).encode()
        fields = {"content-type": PROBLEM, "content-length": str(len(body)), "connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head.encode() + b"\r\n" + body)
        self.transport.close()


def _application(settings: Settings) -> "Gate":
    """Made in each process; prometheus_client looks for the shared folder when it is imported."""
    from actstore.query.server.app import create_app

    _end_with_parent()
    return create_app(settings)


def _end_with_parent() -> None:
    """Have a worker end as on SIGTERM when the process that began it was killed: it would serve, and hold the port,
    for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _log_config(is_verbose: bool) -> dict[str, Any]:
    """Warnings and errors to stderr, each request too if asked for. Tokens come in a header, which is never logged."""
    level = "INFO" if is_verbose else "WARNING"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(message)s"}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "plain",
                "stream": "ext://sys.stderr",
            }
        },
        "loggers": {
            name: {"handlers": ["stderr"], "level": level, "propagate": False}
            for name in ("uvicorn", "actstore")
        },
    }
