"""Blobs on S3, whatever client carries the requests: conditions, lost replies, ranges, retries."""

import abc
import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.storage.blobs import ATTEMPT, BlobInfo, Bytes, Distant, check_key
from actstore.storage.errors import BlobNotFoundError, Kind, RequestError, damaged
from actstore.storage.pinned import Pinnable
from actstore.storage.retries import Retries

CONNECT_TIMEOUT_S: Final = 10
READ_TIMEOUT_S: Final = 60
"""Seconds without any byte of the reply."""

_T = TypeVar("_T")


class _ChangedError(Exception):
    """An object has another ETag than it had before."""


class S3Blobs(Distant, Pinnable, abc.ABC):
    """Objects below ``s3://bucket/prefix``.

    Credentials and endpoint come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``AWS_PROFILE``,
    an instance role), never from the URL. A blob is one PUT whatever its size, as the condition of a multipart upload
    is not atomic everywhere. Subclasses carry single requests, without repeating any, and raise `RequestError`.
    """

    is_emulated = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._bucket, _, root = self.url.split("://", 1)[1].partition("/")
        self._root = f"{root}/" if root else ""
        self._retries = Retries(self.url)
        self._is_bucket_known = False

    @property
    def n_retries(self) -> int:
        return self._retries.n

    def create(self, key: str, parts: Sequence[Bytes], *, metadata: Mapping[str, str] | None = None) -> bool:
        return self._write(key, parts, metadata or {}, None)

    def replace(self, key: str, parts: Sequence[Bytes], *, expected: str) -> bool:
        return self._write(key, parts, {}, expected)

    def _write(
        self, key: str, parts: Sequence[Bytes], metadata: Mapping[str, str], expected: str | None
    ) -> bool:
        path = self._path(key)
        attempt = uuid.uuid4().hex
        own = {**metadata, ATTEMPT: attempt}

        def write() -> bool:
            try:
                self._put(path, parts, own, expected)
            except RequestError as error:
                if error.kind is Kind.MISSING and expected is not None:
                    return False
                if error.kind is not Kind.TAKEN:
                    raise
                # An earlier try of ours may have taken effect though its reply got lost.
                existing = self._head(path)
                if existing is None:
                    self._check_bucket()
                    if expected is None:
                        raise RequestError(Kind.BUSY, "it was deleted meanwhile") from error
                return existing is not None and existing.metadata.get(ATTEMPT) == attempt
            return True

        is_ours = self._retries.run(key, "written", write)
        self._is_bucket_known = True
        return is_ours

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        if nbytes == 0:
            check_key(key)
            return b""  # HTTP has no empty ranges
        data = self._ranged(key, start, nbytes, lambda path, tag: self._get(path, start, nbytes, tag))
        if data is None:
            return b""
        if nbytes is not None and len(data) != nbytes:
            raise damaged(f"{self.url}/{key}", start + len(data), start, nbytes)
        return data

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        if not out.nbytes:
            check_key(key)
            return
        n_read = self._ranged(key, start, out.nbytes, lambda path, tag: self._get_into(path, start, out, tag))
        if n_read != out.nbytes:
            raise damaged(f"{self.url}/{key}", start + (n_read or 0), start, out.nbytes)

    def _ranged(
        self, key: str, start: int, nbytes: int | None, request: Callable[[str, str | None], tuple[_T, str]]
    ) -> _T | None:
        """The result of a request for the version that these blobs are pinned to; None for an open range that begins
        right behind the last byte.

        Args:
            key: key of the object.
            start: first byte.
            nbytes: number of bytes; None for all.
            request: takes the path of the object, and the ETag that it must have if one is known; returns its result
                and the ETag that the object has.
        """
        version = self._version
        if version is None:
            return self._requested(key, start, nbytes, request, None)[0]
        try:
            try:
                result, tag = self._requested(key, start, nbytes, request, version.tag(key))
            except _ChangedError:
                # A repair of the same store changes ETags, too; `check` tells it from another store.
                version.check()
                result, tag = self._requested(key, start, nbytes, request, None)
        except StorageError as error:
            self._explain(error)
            raise
        version.seen(key, tag)
        return result

    def _requested(
        self,
        key: str,
        start: int,
        nbytes: int | None,
        request: Callable[[str, str | None], tuple[_T, str]],
        tag: str | None,
    ) -> tuple[_T | None, str | None]:
        """The result of a request and the ETag of the object, see `_ranged`.

        Raises:
            _ChangedError: the object has another ETag.
        """
        path = self._path(key)

        def send() -> tuple[_T | None, str | None]:
            try:
                result, new_tag = request(path, tag)
            except RequestError as error:
                if tag is not None and error.kind is Kind.TAKEN:
                    raise _ChangedError from error
                if error.kind is not Kind.RANGE:
                    raise
                info = self._head(path)
                if info is None:
                    raise RequestError(Kind.MISSING, "it was deleted meanwhile") from error
                if nbytes is None and start == info.nbytes:
                    return None, None
                raise damaged(f"{self.url}/{key}", info.nbytes, start, nbytes) from error
            return result, new_tag or None

        return self._retries.run(key, "read", send)

    def head(self, key: str) -> BlobInfo | None:
        path = self._path(key)

        def send() -> BlobInfo | None:
            info = self._head(path)
            if info is None:
                self._check_bucket()
            return info

        return self._retries.run(key, "read", send)

    def _check_bucket(self) -> None:
        """Raise if the bucket is missing, which a listing tells; HEAD gives the same reply for a missing object."""
        if not self._is_bucket_known:
            self._list(self._folder("_actstore/probe"))
        self._is_bucket_known = True

    def names(self, prefix: str) -> list[str]:
        files, folders = self._listed(prefix)
        return sorted([*files, *folders])

    def sizes(self, prefix: str) -> dict[str, int]:
        return self._listed(prefix)[0]

    def _listed(self, prefix: str) -> tuple[dict[str, int], set[str]]:
        folder = self._folder(prefix)
        files, folders = self._retries.run(prefix, "listed", lambda: self._list(folder))
        # Some servers list the folder itself, as an empty object with or without its slash.
        return (
            {
                path.removeprefix(folder): nbytes
                for path, nbytes in files.items()
                if path not in (folder, folder[:-1])
            },
            {path.removeprefix(folder).rstrip("/") for path in folders},
        )

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(BlobNotFoundError):
            self._retries.run(key, "deleted", lambda: self._delete(path))

    def free_nbytes(self) -> int | None:
        return None

    def _path(self, key: str) -> str:
        return self._root + check_key(key)

    def _folder(self, prefix: str) -> str:
        return f"{self._path(prefix)}/" if prefix else self._root

    @abc.abstractmethod
    def _put(
        self, path: str, parts: Sequence[Bytes], metadata: Mapping[str, str], expected: str | None
    ) -> None:
        """Send one PUT, on the condition that there is no such object, or that its ETag is ``expected``."""

    @abc.abstractmethod
    def _get(self, path: str, start: int, nbytes: int | None, tag: str | None) -> tuple[Bytes, str]:
        """Bytes of an object, fewer where it ends earlier, and its ETag. It must be ``tag``, if that is given."""

    @abc.abstractmethod
    def _get_into(self, path: str, start: int, out: NDArray[np.uint8], tag: str | None) -> tuple[int, str]:
        """Read bytes of an object into memory, as `_get` does; returns the number of bytes read, and the ETag."""

    @abc.abstractmethod
    def _head(self, path: str) -> BlobInfo | None:
        """Size, tag and metadata of an object; None if there is no such object, or no such bucket."""

    @abc.abstractmethod
    def _list(self, folder: str) -> tuple[dict[str, int], set[str]]:
        """Sizes in bytes of the objects directly below a folder, by path, and the paths of the folders there."""

    def signed(self, key: str, seconds: int) -> str:
        """Implements `BlobReader.signed`."""
        path = self._path(key)
        return self._retries.run(key, "read", lambda: self._sign(path, seconds))

    @abc.abstractmethod
    def _sign(self, path: str, seconds: int) -> str:
        """Sign a URL of an object; no request is sent."""

    @abc.abstractmethod
    def _delete(self, path: str) -> None:
        """Remove an object; it is no error if there is none."""
