"""The storage behind a server, read without it: by path, by presigned URLs, or with credentials of one's own."""

import http.client
import threading
import time
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.query.client.connections import Connections
from actstore.query.client.http_blobs import HttpBlobs, take_range
from actstore.query.client.server import Server
from actstore.query.documents import FetchPlan, Place, PlanRequest
from actstore.store.blobs import BlobInfo, BlobReader, Blobs, check_key, open_blobs
from actstore.store.commit import plan_key
from actstore.store.plan import FIRST_RUN
from actstore.store.retries import Retries
from actstore.store.run import Run, read_runs
from actstore.store.shard import Bytes
from actstore.store.storage_errors import Kind, RequestError, kind_of_reply

_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_PROBE_S: Final = 5
_MARGIN: Final = 0.5
"""Of the time that a URL is good for. Nothing is asked for with an older one."""


def direct_blobs(server: Server, runs: Sequence[Run], *, must: bool = False) -> BlobReader | None:
    """The storage of a store, if this process can read it and finds the same store there.

    Args:
        server: of the store.
        runs: that the server gives.
        must: raise, rather than give None.

    Raises:
        StorageError: it cannot be read.
    """
    key = plan_key(FIRST_RUN)
    try:
        place = server.document(FetchPlan, "/plan", asked=PlanRequest(keys=[key])).places[0]
        if place.kind == "http":
            _probe(place.url)
            return SignedBlobs(server)
        found = _opened(server, place)
        theirs = {run.plan.run: run for run in read_runs(found)}
        if any(not _is_same(run, theirs.get(run.plan.run)) for run in runs):
            raise StorageError(f"what is at {place.url.removesuffix(key)} is another store, or a part of it")
    except Exception as error:
        if must:
            raise StorageError(
                f"the storage behind {server.url} cannot be read from here: {error}; open it without direct=True"
            ) from error
        return None
    return found


def _is_same(run: Run, other: Run | None) -> bool:
    """Whether all of a run is in the other one, with the same checksums once it is finished."""
    if other is None or run.plan != other.plan or not set(run.committed) <= set(other.committed):
        return False
    return run.finished is None or run.finished == other.finished


def _opened(server: Server, place: Place) -> Blobs:
    root = place.url.removesuffix(f"/{place.key}")
    scheme = urlsplit(root).scheme
    if place.kind == "file":
        if urlsplit(server.url).hostname not in _LOOPBACK:
            # A path of another machine may be anything here.
            raise StorageError(f"{root} is on the disk of the server")
    elif scheme in ("", "file", "local", "http", "https"):
        raise StorageError(f"{root} is not where others could read it")
    return open_blobs(root)


def _probe(url: str) -> None:
    """Ask once, and briefly: storage may be in another network.

    Raises:
        RequestError: it cannot be reached from here, or does not take the URL.
    """
    connections = Connections(connect_s=_PROBE_S, read_s=_PROBE_S)
    with connections.request("GET", url, {"Range": "bytes=0-0"}) as reply:
        reply.read()
        if reply.status >= 300:
            raise RequestError(Kind.DENIED, f"storage answered with status {reply.status}")
    connections.close()


class SignedBlobs:
    """`BlobReader` of objects whose URLs a server signs. Threads may share it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._through = HttpBlobs(server)
        self._connections = Connections()
        self._retries = Retries(server.url)
        self._lock = threading.Lock()
        self._urls: dict[str, tuple[str, float]] = {}
        self.url = server.url

    @property
    def n_retries(self) -> int:
        return self._retries.n + self._server.n_retries

    def _signed(self, key: str) -> str:
        with self._lock:
            url, until = self._urls.get(key, ("", 0.0))
        if time.monotonic() < until:
            return url
        asked_at = time.monotonic()
        plan = self._server.document(FetchPlan, "/plan", asked=PlanRequest(keys=[check_key(key)]))
        url = plan.places[0].url
        with self._lock:
            self._urls[key] = url, asked_at + _MARGIN * (plan.expires_s or 0)
        return url

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        """As `BlobReader.read`."""
        if nbytes is None:
            info = self.head(key)
            if info is None:
                return self._through.read(key, start)  # which says that it is missing
            nbytes = max(0, info.nbytes - start)
        out = np.empty(nbytes, np.uint8)
        self.read_into(key, start, out)
        return out

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """As `BlobReader.read_into`."""
        if not out.nbytes:
            check_key(key)
            return
        span = {"Range": f"bytes={start}-{start + out.nbytes - 1}"}

        def ask() -> None:
            url = self._signed(key)
            with self._connections.request("GET", url, span) as reply:
                if reply.status >= 300:
                    raise self._refused(reply, key)
                take_range(reply, f"{self.url}/{key}", start, out)

        self._retries.run(key, "read", ask)

    def _refused(self, reply: http.client.HTTPResponse, key: str) -> RequestError:
        reply.read()
        kind = kind_of_reply(reply.status, "")
        with self._lock:
            was_there = self._urls.pop(key, None) is not None
        if kind is Kind.DENIED and was_there:
            kind = Kind.BROKEN  # the credentials that signed it may have ended before it did
        return RequestError(kind, f"storage answered with status {reply.status}")

    def head(self, key: str) -> BlobInfo | None:
        """Of the server, as a URL is signed for GET alone."""
        return self._through.head(key)
