"""Reads the storage behind a server without the server: by path, by presigned URLs, or with own credentials."""

import http.client
import threading
import time
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.query.client.bounds import OBJECT_NBYTES, read_problem, unexpected
from actstore.query.client.connections import Connections
from actstore.query.client.http_blobs import HttpBlobs, take_range
from actstore.query.client.places import place_of
from actstore.query.client.server import Server
from actstore.reason import reason
from actstore.storage.blobs import BlobInfo, BlobReader, Bytes, Distant, check_key
from actstore.storage.errors import Kind, RequestError, kind_of_reply
from actstore.storage.opening import open_blobs
from actstore.storage.pinned import Pinnable
from actstore.storage.retries import Retries
from actstore.store.format.plan import FIRST_RUN
from actstore.store.records.commit import plan_key
from actstore.store.records.run import Run, read_runs

_PROBE_S: Final = 5
_CHANGED: Final = 412
_MARGIN: Final = 0.5
"""Share of the lifetime of a URL for which the client uses it."""


def direct_blobs(server: Server, runs: Sequence[Run], *, must: bool = False) -> BlobReader | None:
    """The storage of a store, if this process can read it and finds the same store there.

    Args:
        server: server of the store.
        runs: runs as the server gives them.
        must: raise, rather than give None.

    Raises:
        StorageError: the storage cannot be read, and ``must`` is set.
    """
    key = plan_key(FIRST_RUN)
    try:
        place, _ = place_of(server, key)
        if place.kind == "http":
            _probe(place.url)
            return SignedBlobs(server)
        blobs = open_blobs(place.url.removesuffix(f"/{key}"))
        theirs = {run.plan.run: run for run in read_runs(blobs)}
        if any(not _is_same(run, theirs.get(run.plan.run)) for run in runs):
            raise StorageError(f"what is at {place.url.removesuffix(key)} is another store, or a part of it")
    except Exception as error:
        if must:
            raise StorageError(
                f"the storage behind {server.url} cannot be read from here: {reason(error)}; open it without "
                "direct=True"
            ) from error
        return None
    return blobs


def _is_same(run: Run, other: Run | None) -> bool:
    """Whether all of a run is in the other one, with the same checksums once it is finished."""
    if other is None or run.plan != other.plan or len(run.committed) > len(other.committed):
        return False
    if not other.is_complete and not all(number in other.committed for number in run.committed):
        return False
    return run.finished is None or run.finished == other.finished


def _probe(url: str) -> None:
    """Send one request with short timeouts: storage may be in another network.

    Raises:
        RequestError: storage cannot be reached from here, or refuses the URL.
    """
    connections = Connections(connect_s=_PROBE_S, read_s=_PROBE_S)
    with connections.request("GET", url, {"Range": "bytes=0-0"}) as reply:
        if reply.status not in (200, 206):
            raise RequestError(Kind.DENIED, f"storage answered with status {reply.status}")
    connections.close()


class SignedBlobs(Distant, Pinnable):
    """`BlobReader` of objects whose URLs a server signs. Threads may share it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._http_blobs = HttpBlobs(server)
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
        place, expires_s = place_of(self._server, check_key(key))
        if place.kind != "http":
            raise unexpected(self.url, f"a place of the kind {place.kind}", "a presigned URL, as before,")
        with self._lock:
            self._urls[key] = place.url, asked_at + _MARGIN * expires_s
        return place.url

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        """Implements `BlobReader.read`."""
        if nbytes is None:
            info = self.head(key)
            if info is None:
                return self._http_blobs.read(key, start)  # raises the error for a missing object
            if info.nbytes > OBJECT_NBYTES:
                raise unexpected(f"{self.url}/{key}", f"{info.nbytes} bytes", f"at most {OBJECT_NBYTES}")
            nbytes = max(0, info.nbytes - start)
        out = np.empty(nbytes, np.uint8)
        self.read_into(key, start, out)
        return out

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """Implements `BlobReader.read_into`."""
        if not out.nbytes:
            check_key(key)
            return
        try:
            tag = self._read_into(key, start, out, None if self._version is None else self._version.tag(key))
        except StorageError as error:
            self._explain(error)
            raise
        if self._version is not None:
            self._version.seen(key, tag)

    def _read_into(self, key: str, start: int, out: NDArray[np.uint8], known: str | None) -> str | None:
        """
        Args:
            known: the ETag that the object must have, if one is known.

        Returns:
            The ETag that it has.
        """
        headers = {"Range": f"bytes={start}-{start + out.nbytes - 1}"}
        if known is not None:
            headers["If-Match"] = known

        def ask() -> str | None:
            url = self._signed(key)
            with self._connections.request("GET", url, headers) as reply:
                if reply.status == _CHANGED:
                    read_problem(reply)
                    self.check_version()
                    headers.pop("If-Match", None)  # the same store, repaired: its records say so
                    raise RequestError(Kind.BROKEN, "it was written again meanwhile")
                if reply.status >= 300:
                    raise self._refused(reply, key)  # redirects are refused, too: they could lead anywhere
                take_range(reply, f"{self.url}/{key}", start, out)
                return reply.getheader("ETag")

        return self._retries.run(key, "read", ask)

    def _refused(self, reply: http.client.HTTPResponse, key: str) -> RequestError:
        read_problem(reply)
        kind = kind_of_reply(reply.status, "")
        with self._lock:
            was_there = self._urls.pop(key, None) is not None
        if kind is Kind.DENIED and was_there:
            kind = Kind.BROKEN  # the credentials that signed the URL may have expired before it did
        return RequestError(kind, f"storage answered with status {reply.status}")

    def head(self, key: str) -> BlobInfo | None:
        """Ask the server, as a URL is signed for GET only."""
        return self._http_blobs.head(key)
