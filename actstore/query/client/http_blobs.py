"""The objects of a served store, read over HTTP."""

import http.client
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.query.client.bounds import OBJECT_NBYTES, announced, read_document, shown, unexpected
from actstore.query.client.connections import read_into
from actstore.query.client.server import Server
from actstore.storage.blobs import BlobInfo, Bytes, Distant, check_key
from actstore.storage.errors import BlobNotFoundError, damaged

_WHOLE: Final = 200
_PART: Final = 206


class HttpBlobs(Distant):
    """`BlobReader` of a store on a server: its ``/zarr`` resource."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.url = server.url

    @property
    def n_retries(self) -> int:
        return self._server.n_retries

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        """Implements `BlobReader.read`."""
        if nbytes is not None:
            out = np.empty(nbytes, np.uint8)
            self.read_into(key, start, out)
            return out

        def take(reply: http.client.HTTPResponse) -> bytes:
            return read_document(reply, f"{self.url}/{key}", OBJECT_NBYTES)

        data = self._server.take(self._path(key), take)
        self._server.count(len(data))
        if len(data) < start:
            raise damaged(f"{self.url}/{key}", len(data), start, nbytes)
        return data[start:]

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """Implements `BlobReader.read_into`."""
        if not out.nbytes:
            check_key(key)
            return

        def take(reply: http.client.HTTPResponse) -> None:
            take_range(reply, f"{self.url}/{key}", start, out)

        span = {"Range": f"bytes={start}-{start + out.nbytes - 1}"}
        self._server.take(self._path(key), take, headers=span)
        self._server.count(out.nbytes)

    def head(self, key: str) -> BlobInfo | None:
        """Implements `BlobReader.head`."""

        def take(reply: http.client.HTTPResponse) -> BlobInfo:
            length = announced(reply, f"{self.url}/{key}")
            reply.read()
            return BlobInfo(length, reply.getheader("ETag") or "", {})

        try:
            return self._server.take(self._path(key), take, method="HEAD")
        except BlobNotFoundError:
            return None

    def _path(self, key: str) -> str:
        return f"/zarr/{check_key(key)}"


def take_range(reply: http.client.HTTPResponse, where: str, start: int, out: NDArray[np.uint8]) -> None:
    """Read the bytes of a reply to a request for a range, which may be all of the object.

    Raises:
        RequestError: the reply was cut off.
        StorageError: the object is shorter, or something else came.
    """
    length = announced(reply, where)
    if reply.status == _WHOLE and start == 0 and length == out.nbytes:
        pass
    elif reply.status != _PART:
        raise unexpected(
            where, f"status {reply.status} and {length} bytes", f"a range of {out.nbytes} bytes, 206,"
        )
    elif length < out.nbytes:
        raise damaged(where, start + length, start, out.nbytes)
    else:
        span = f"bytes {start}-{start + out.nbytes - 1}/"
        given = reply.getheader("Content-Range", span)
        if length != out.nbytes or not given.startswith(span):
            raise unexpected(where, f"{length} bytes, {shown(given)},", f"{span}*")
    read_into(reply, out)
