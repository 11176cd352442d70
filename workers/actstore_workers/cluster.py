"""Joining a Ray cluster, or starting one on this machine for the length of a run."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import ModuleType

from actstore.errors import ExtractError, MissingExtraError
from actstore.reason import reason

# Only metadata goes through the object store, for which Ray would otherwise reserve 30 % of the memory.
_OBJECT_STORE_NBYTES = 200 << 20
_CONNECT_S = 10.0


def import_ray() -> ModuleType:
    """Import Ray with its telemetry and its ``uv run`` hook turned off, unless the user has set them.

    The hook would install the whole environment again for each worker.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # Ray 2.60 warns at each start that this default will change.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(
            "the ray executor needs Ray, which is not installed; run `pip install 'actstore[ray]'`"
        ) from error
    module: ModuleType = ray
    return module


@contextlib.contextmanager
def cluster(address: str | None, *, num_cpus: int | None = None) -> Iterator[ModuleType]:
    """Connect to Ray; on leaving, stop what was started here.

    Args:
        address: the address of a running cluster (``auto``, ``host:port``); None starts one, unless this process is in
            one.
        num_cpus: the CPUs of a cluster that is started here; None counts them.

    Raises:
        MissingExtraError: Ray is not installed.
        ExtractError: there is no cluster at this address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    own: dict[str, object] = {}
    if address is None:
        # Nothing else needs to find the driver, so it runs without dashboard and without the dashboard's port.
        own = {
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_NBYTES,
            "num_cpus": num_cpus,
        }
    with _keeping_sigterm():
        try:
            _check_reachable(address)
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=True,
                **own,
            )
        except (OSError, ValueError, RuntimeError) as error:
            if address is None:
                raise ExtractError(f"Ray cannot be started on this machine: {reason(error)}") from error
            raise ExtractError(
                f"there is no Ray cluster to join at {address!r}: {reason(error)}; start one with "
                "`ray start --head`, or leave the address out"
            ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Check quickly that a host and port can be reached; Ray itself would try for minutes.

    Raises:
        OSError: nothing listens at this host and port.
    """
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "://" not in host:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Restore our handler of SIGTERM, which ``ray.init`` replaces with its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
