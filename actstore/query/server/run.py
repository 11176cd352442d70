"""Runs the server: binds its sockets, shares folders between its processes, and ends them."""

import contextlib
import functools
import gc
import logging
import multiprocessing
import os
import signal
import socket
import ssl
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from actstore.errors import ActstoreError, JobError, StorageError
from actstore.query.loopback import is_loopback
from actstore.query.server.connections.accepting import ConnectionFactory
from actstore.query.server.connections.addresses import Proxies
from actstore.query.server.connections.room import raise_descriptor_limit
from actstore.query.server.settings import MULTIPROCESS, Settings
from actstore.reason import reason

if TYPE_CHECKING:
    from actstore.query.server.admission.gate import Gate

_NOT_STARTED: Final = "a process of the server could not start; see above"
_LOG: Final = logging.getLogger(__name__)
_DRAIN_S: Final = 30
"""Seconds for requests that are under way when the server is told to end."""
_BACKLOG: Final = 2048
_CONNECT_S: Final = 1.0
_UDS_MODE: Final = 0o600
"""Mode of a Unix socket: for the user only. With tokens, everybody on the machine may connect."""
_UDS_MODE_WITH_TOKENS: Final = 0o666


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and with how many processes."""

    host: str = "127.0.0.1"
    port: int = 8000
    """TCP port; 0 takes a free one."""
    uds: Path | None = None
    """Path of a Unix socket to listen at besides."""
    workers: int = 1
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    verbose: bool = False
    """Whether to log the messages of uvicorn, too."""


def bind_sockets(listening: Listening, settings: Settings) -> list[socket.socket]:
    """Bind the sockets of a server, which its processes share: that of its address, and the Unix socket if there is
    one.

    Raises:
        JobError: the server would be open to everybody, or its certificate cannot be used.
        StorageError: an address cannot be bound.
    """
    if settings.token_file is None and not is_loopback(listening.host):
        raise JobError(
            f"{listening.host} can be reached from elsewhere, so everybody could read the stores; give --token-file, "
            "or stay on 127.0.0.1"
        )
    _check_certificate(listening)
    sockets = [_bound_tcp(listening, settings)]
    if listening.uds is not None:
        try:
            sockets.append(_bound_uds(listening.uds, settings))
        except BaseException:
            sockets[0].close()
            raise
    return sockets


def _bound_tcp(listening: Listening, settings: Settings) -> socket.socket:
    host, port = listening.host, listening.port
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Connections inherit it: the system ends one whose client takes nothing, with the data that waits for it.
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.stall_s))
        server.bind((host, port))
        server.listen(_BACKLOG)  # clients that come before the processes are up wait
    except OSError as error:
        server.close()
        raise StorageError(
            f"{host}:{port} cannot be listened at: {error.strerror}; choose another --port, or 0 for a free one"
        ) from error
    return server


def _bound_uds(path: Path, settings: Settings) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket() and _is_abandoned(path):
            path.unlink()  # a server that was killed left it
        server.bind(str(path))
        path.chmod(_UDS_MODE if settings.token_file is None else _UDS_MODE_WITH_TOKENS)
        server.listen(_BACKLOG)
    except OSError as error:
        server.close()
        raise StorageError(
            f"{path} cannot be made a Unix socket: {reason(error)}; choose another --uds, of at most 107 bytes, that "
            "no other server listens at"
        ) from error
    return server


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_abandoned(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_CONNECT_S)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False  # a server is there, and busy
    return False


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
            f"the certificate {path} cannot be used with the key {key or path}: {reason(error)}; give PEM "
            "files, and a key without a password"
        ) from error


def url_of(listening: Listening, server: socket.socket) -> str:
    """The URL that clients use for one of the sockets."""
    if server.family == socket.AF_UNIX:
        return f"http+unix://{quote(str(Path(listening.uds or '').absolute()), safe='')}"
    scheme = "http" if listening.ssl_certfile is None else "https"
    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    return f"{scheme}://{host}:{server.getsockname()[1]}"


@contextlib.contextmanager
def share_folders(settings: Settings) -> Iterator[Settings]:
    """Make the folders that all processes use: counters, and the cache if the user named none. They are removed at the
    end.
    """
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


def serve(settings: Settings, listening: Listening, sockets: list[socket.socket]) -> None:
    """Serve until SIGTERM or SIGINT; requests that are under way then are finished.

    Raises:
        JobError: a process could not start.
    """
    raise_descriptor_limit()
    socket_file = None if listening.uds is None else _identity(listening.uds)
    limits = settings.connection_limits
    proxies = Proxies(settings.forwarded_allow_ips)
    factory = ConnectionFactory(limits, settings.max_request, settings.stall_s, proxies)
    config = uvicorn.Config(
        functools.partial(_application, settings),
        factory=True,
        workers=listening.workers,
        # Any callable will do; uvicorn only calls it.
        http=factory,  # type: ignore[arg-type]
        ws="none",
        loop="actstore.query.server.connections.accepting:AcceptingLoop",
        log_config=_log_config(listening.verbose),
        access_log=False,
        proxy_headers=False,  # the gate reads them
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=limits.keep_alive_s,
        timeout_graceful_shutdown=_DRAIN_S,
        ssl_certfile=listening.ssl_certfile,
        ssl_keyfile=listening.ssl_keyfile,
    )
    # uvicorn ends by raising the signal again, which is no error here.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    try:
        if listening.workers > 1:
            processes = _Processes(config, sockets)
            processes.run()
            if processes.has_failed:
                raise JobError(_NOT_STARTED)
        else:
            try:
                uvicorn.Server(config).run(sockets)
            except SystemExit as error:
                raise JobError(_NOT_STARTED) from error
    finally:
        if listening.uds is not None and _identity(listening.uds) == socket_file:
            listening.uds.unlink(missing_ok=True)  # but not the socket of a server that took the place


class _Processes(Multiprocess):
    """uvicorn's supervisor, which also remembers whether it ended because a process could not start."""

    has_failed = False

    def keep_subprocess_alive(self) -> None:
        """Implements uvicorn's method, which ends when a process reports that it could not start."""
        was_ending = self.should_exit.is_set()
        super().keep_subprocess_alive()
        self.has_failed |= self.should_exit.is_set() and not was_ending


def _application(settings: Settings) -> "Gate":
    """Make the application, in each process; prometheus_client looks for the shared folder when it is imported."""
    try:
        from actstore.query.server.app import create_app
        from actstore.query.server.memory import heap

        heap.give_back_large_blocks()
        _end_with_parent()
        application = create_app(settings)
    except Exception as error:  # noqa: BLE001 - after any error there is no server
        # With another exit code the process would be started again and again.
        is_known = isinstance(error, ActstoreError)
        _LOG.error("this process cannot serve: %s", error, exc_info=None if is_known else error)
        sys.exit(STARTUP_FAILURE)
    # What is loaded now stays to the end: the collector need not go through all of it again and again.
    gc.collect()
    gc.freeze()
    return application


def _end_with_parent() -> None:
    """End a worker as on SIGTERM when its parent process was killed; it would serve, and hold the port, for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _log_config(is_verbose: bool) -> dict[str, Any]:
    """Log warnings and errors to stderr, with ``is_verbose`` also each request. Tokens are in a header that is never
    logged.
    """
    level = "INFO" if is_verbose else "WARNING"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(message)s"}},
        "handlers": {
            "stderr": {
                "class": "actstore.query.server.monitoring.lines.StderrHandler",
                "formatter": "plain",
            }
        },
        "loggers": {
            name: {"handlers": ["stderr"], "level": level, "propagate": False}
            for name in ("uvicorn", "actstore")
        },
    }
