"""Blobs on any fsspec file system; S3 through s3fs is the one that is proven."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fsspec

from actstore.errors import StorageError
from actstore.store.blobs import BlobNotFoundError
from actstore.store.shard import Bytes, view

_S3_OPTIONS: dict[str, Any] = {
    # A cached listing would hide what other workers commit.
    "use_listings_cache": False,
    # A cached client would keep the credentials it was made with, or none, after the environment has new ones.
    "skip_instance_cache": True,
    "config_kwargs": {"max_pool_connections": 64, "retries": {"mode": "standard", "max_attempts": 5}},
}
_CONFLICT_RETRIES = 20


class RemoteBlobs:
    """Objects below ``scheme://bucket/prefix``. Credentials and endpoint come from the environment
    (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, an instance role), never from the URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.scheme = url.split("://", 1)[0]
        options = _S3_OPTIONS if self.scheme in ("s3", "s3a") else {}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            raise StorageError(f"{url} cannot be opened: {error}") from error

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def create(self, key: str, parts: Sequence[Bytes]) -> bool:
        body = b"".join(view(part) for part in parts)
        for attempt in range(_CONFLICT_RETRIES):
            try:
                with self._explaining(key, "written"):
                    # One PUT whatever the size: the condition on a multipart upload is not atomic everywhere.
                    single = {"chunksize": max(len(body), 1)} if self.scheme in ("s3", "s3a") else {}
                    self._fs.pipe_file(self._path(key), body, mode="create", **single)
                    return True
            except _ExistsError:
                return False
            except _ConflictError:
                # 409: another create of this key is under way. It may still fail, so ask again.
                time.sleep(0.05 * (attempt + 1))
        raise StorageError(f"{self.url}/{key} stays locked by other writers; run the same command again")

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        if nbytes == 0:
            return b""  # no range of bytes is empty
        with self._explaining(key, "read"):
            # An explicit end spares s3fs a HEAD.
            stop = None if nbytes is None else start + nbytes
            data: bytes = self._fs.cat_file(self._path(key), start=start, end=stop)
        if nbytes is not None and len(data) != nbytes:
            raise StorageError(
                f"{self.url}/{key} gave {len(data)} bytes from {start} where {nbytes} were expected; it is damaged"
            )
        return data

    def size(self, key: str) -> int | None:
        try:
            with self._explaining(key, "read"):
                return int(self._fs.size(self._path(key)))
        except BlobNotFoundError:
            return None

    def names(self, prefix: str) -> list[str]:
        try:
            with self._explaining(prefix, "listed"):
                entries = self._fs.ls(self._path(prefix), detail=False)
        except BlobNotFoundError:
            return []
        # A blob, and on some servers an empty folder, lists itself.
        folder = self._path(prefix).strip("/") + "/"
        below = (entry.strip("/") for entry in entries)
        return sorted(entry.removeprefix(folder) for entry in below if entry.startswith(folder))

    def delete(self, key: str) -> None:
        try:
            with self._explaining(key, "deleted"):
                self._fs.rm_file(self._path(key))
        except BlobNotFoundError:
            pass

    def free_nbytes(self) -> int | None:
        return None

    @contextmanager
    def _explaining(self, key: str, verb: str) -> Iterator[None]:
        """Turn what botocore and fsspec raise into our errors, one sentence each."""
        where = f"{self.url}/{key}"
        try:
            yield
        except Exception as error:
            code = _error_code(error)
            if code in ("PreconditionFailed", "412") or isinstance(error, FileExistsError):
                raise _ExistsError from error
            if code in ("ConditionalRequestConflict", "409"):
                raise _ConflictError from error
            if code == "NoSuchBucket" or "bucket does not exist" in str(error):
                raise StorageError(
                    f"{self.url}: the bucket does not exist; create it first, or correct the name"
                ) from error
            if isinstance(error, FileNotFoundError):
                raise BlobNotFoundError(f"{where} does not exist") from error
            name = type(error).__name__
            if name in ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"):
                raise StorageError(
                    f"{where} cannot be {verb}: no credentials found; set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give this machine a role"
                ) from error
            if isinstance(error, PermissionError):
                raise StorageError(
                    f"{where} cannot be {verb}: access denied to these credentials ({error})"
                ) from error
            if name in ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"):
                raise StorageError(
                    f"{where} cannot be {verb}: the server is not reachable ({error})"
                ) from error
            if isinstance(error, OSError) or "botocore" in type(error).__module__:
                raise StorageError(f"{where} cannot be {verb}: {error}") from error
            raise


class _ExistsError(Exception):
    pass


class _ConflictError(Exception):
    pass


def _error_code(error: BaseException) -> str | None:
    """The S3 error code below an exception that s3fs translated, if there is one."""
    below: BaseException | None = error
    while below is not None:
        response = getattr(below, "response", None)
        if isinstance(response, dict):
            code = response.get("Error", {}).get("Code")
            return None if code is None else str(code)
        below = below.__cause__
    return None
