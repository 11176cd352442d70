"""Counters for Prometheus, over all worker processes together."""

import os
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

from actstore.query.server.settings import MULTIPROCESS

_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_REGISTRY: Final = CollectorRegistry()
"""Registry for a server with one process."""


def _counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
    return Counter(f"actstore_{name}", text, labels, registry=_REGISTRY)


_REQUESTS: Final = _counter("requests", "Requests that were answered.", ("route", "method", "status"))
_BYTES: Final = _counter("reply_bytes", "Bytes of the bodies of replies.", ("route",))
_OF_CLIENT: Final = _counter("client_requests", "Requests of a token, by its name.", ("client", "status"))
_BYTES_OF_CLIENT: Final = _counter(
    "client_reply_bytes", "Bytes of the bodies of replies to a token.", ("client",)
)
_SECONDS: Final = Histogram(
    "actstore_request_seconds",
    "From a request to the end of its reply.",
    ("route",),
    buckets=_BUCKETS,
    registry=_REGISTRY,
)
_MADE: Final = _counter("batches_made", "Batches that were read from a store.")
_SHARED: Final = _counter("batches_shared", "Requests for a batch that was made for another one, or ahead.")
_HITS: Final = _counter("cache_hits", "Reads of shards that were in the cache on disk.")
_MISSES: Final = _counter("cache_misses", "Shards that were fetched into the cache on disk.")
_STORAGE: Final = _counter(
    "storage_bytes", "Bytes of windows of batches that were read from storage, or mapped."
)
_SCANNED: Final = _counter("scanned_rows", "Rows, sequences and tokens of records that scans looked at.")
_DROPPED: Final = _counter("access_log_dropped", "Lines of the access log that could not be written in time.")
_MEMORY: Final = Gauge(
    "actstore_memory_bytes",
    "Memory that is held for clients, as of the last reply of each process.",
    registry=_REGISTRY,
    multiprocess_mode="livesum",
)


class Metrics:
    """Counters of one process. No label has the name of a store, or of anything else that a client may not know; names
    of clients are only for those who may read all stores, as all metrics are.
    """

    def count(self, scope: Any, client: str | None, status: int | None, nbytes: int, seconds: float) -> None:
        """Count a request and its reply.

        Args:
            scope: ASGI scope of the request.
            client: name of the token; None without one. Addresses are no labels, as there is no end to them.
            status: status of the reply; None if there was none.
            nbytes: bytes of the body of the reply.
            seconds: from the head of the request to the end of the reply.
        """
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
        _REQUESTS.labels(route, method, str(status or 0)).inc()
        _BYTES.labels(route).inc(nbytes)
        _SECONDS.labels(route).observe(seconds)
        if client is not None:
            _OF_CLIENT.labels(client, str(status or 0)).inc()
            _BYTES_OF_CLIENT.labels(client).inc(nbytes)

    def count_refusal(self, status: int | None) -> None:
        """Count a connection that was refused before there was a request."""
        _REQUESTS.labels("other", "other", str(status or 0)).inc()

    def count_dropped_lines(self, n_lines: int) -> None:
        """Count lines of the access log that were dropped."""
        _DROPPED.inc(n_lines)

    def count_batch(self, *, is_shared: bool) -> None:
        """Count a batch that a client asked for."""
        (_SHARED if is_shared else _MADE).inc()

    def count_reads(self, n_hits: int, n_misses: int, nbytes: int) -> None:
        """Count what making a batch read."""
        _HITS.inc(n_hits)
        _MISSES.inc(n_misses)
        _STORAGE.inc(nbytes)

    def count_scanned(self, n_rows: int) -> None:
        """Count the rows of one piece of a scan."""
        _SCANNED.inc(n_rows)

    def set_memory(self, nbytes: int) -> None:
        """Set the memory that this process holds now."""
        _MEMORY.set(nbytes)

    def text(self) -> bytes:
        """All counters in the text format of Prometheus."""
        if MULTIPROCESS in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            return generate_latest(registry)
        return generate_latest(_REGISTRY)
