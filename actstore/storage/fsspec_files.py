"""Blobs on any fsspec file system but the local one and S3."""

import contextlib
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import aiohttp
import fsspec
import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.reason import reason
from actstore.storage.blobs import BlobInfo, Bytes, Distant, check_key, view
from actstore.storage.errors import BlobNotFoundError, Kind, RequestError, damaged
from actstore.storage.partial_files import PARTIAL
from actstore.storage.pinned import Pinnable
from actstore.storage.retries import Retries

_REFUSES_ITSELF: Final = ("gs", "gcs", "az", "abfs", "abfss")
"""Schemes whose fsspec class passes the condition of a create on to the storage."""
_LOCKS: Final = tuple(threading.Lock() for _ in range(64))
_TAGS: Final = ("ETag", "etag", "generation", "mtime", "last_modified", "LastModified", "created")
"""Fields in which fsspec classes say which version of a file it is."""


class RemoteBlobs(Distant, Pinnable):
    """Files below any fsspec URL.

    Where the storage cannot refuse a create itself, and in every `replace`, the condition is checked before the write.
    That is atomic among the threads of this process but not among processes, see `is_emulated`. ``memory://`` belongs
    to one process alone.

    Where the fsspec class has a move of its own (SFTP, FTP, SMB, HDFS, DBFS, mounted disks), a blob is written to a
    partial file and moved to its name once it is whole. SMB, HDFS and DBFS refuse to move to a taken name: there a
    `replace` first removes the old blob, and a process that is killed in between leaves none. A class without a move
    would only copy and delete, so its blobs are written to the final name at once. On object stores they are whole;
    elsewhere a writer that is killed can leave a blob cut short.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise StorageError(f"{url} cannot be opened: {reason(error)}") from error
        self._root = root.rstrip("/")
        self._retries = Retries(self.url)
        scheme = url.split("://", 1)[0]
        self._refuses_itself = scheme in _REFUSES_ITSELF
        self.is_emulated = scheme not in (*_REFUSES_ITSELF, "memory")
        self._moves = type(self._fs).mv is not fsspec.AbstractFileSystem.mv

    @property
    def n_retries(self) -> int:
        return self._retries.n

    def create(
        self,
        key: str,
        parts: Sequence[Bytes],
        *,
        metadata: Mapping[str, str] | None = None,  # noqa: ARG002 - file systems keep none
    ) -> bool:
        path, body = self._path(key), b"".join(map(view, parts))

        def write() -> bool:
            if self._refuses_itself:
                try:
                    with _translated():
                        self._fs.pipe_file(path, body, mode="create")
                except RequestError as error:
                    if error.kind is Kind.TAKEN:
                        return False
                    raise
                return True
            return self._write_if(path, body, None)

        return self._retries.run(key, "written", write)

    def replace(self, key: str, parts: Sequence[Bytes], *, expected: str) -> bool:
        path, body = self._path(key), b"".join(map(view, parts))
        return self._retries.run(key, "written", lambda: self._write_if(path, body, expected))

    def _write_if(self, path: str, body: bytes, expected: str | None) -> bool:
        with _LOCKS[hash(path) % len(_LOCKS)]:
            existing = self._head(path)
            if (existing.tag if existing else None) != expected:
                return False
            if self._moves:
                return self._write_and_move(path, body, is_new=expected is None)
            with _translated():
                self._fs.pipe_file(path, body)
            return True

    def _write_and_move(self, path: str, body: bytes, *, is_new: bool) -> bool:
        partial = f"{self._root}/{PARTIAL}/{uuid.uuid4().hex}"
        if self._info(path) is not None and is_new:
            # Some file systems would move the file into the folder.
            raise RequestError(Kind.OTHER, "a folder is in its place")
        try:
            with _translated():
                for file in (partial, path):
                    self._fs.makedirs(file.rpartition("/")[0], exist_ok=True)
                self._fs.pipe_file(partial, body)
            return self._move(partial, path, is_new=is_new)
        finally:
            with contextlib.suppress(
                Exception
            ):  # it was moved; or storage cannot be reached, and `remove_scratch` removes it later
                self._fs.rm_file(partial)

    def _move(self, partial: str, path: str, *, is_new: bool) -> bool:
        """Move a partial file to its name; False if another process created that blob first."""
        refusal = self._refusal(partial, path)
        if refusal is not None and self._head(path) is not None:
            if is_new:
                return False
            with _translated():
                self._fs.rm_file(path)
            refusal = self._refusal(partial, path)
        if refusal is not None:
            raise refusal
        return True

    def _refusal(self, partial: str, path: str) -> RequestError | None:
        """Move a file, and return the error if it is still in its old place. WebHDFS raises nothing then."""
        refusal = RequestError(Kind.OTHER, "it could not be moved to its name")
        try:
            with _translated():
                self._fs.mv(partial, path)
        except RequestError as error:
            if error.kind is Kind.MISSING:
                # A cleanup after killed writers took it for one of theirs.
                raise RequestError(Kind.BUSY, f"the partial file was deleted meanwhile ({error})") from error
            if error.kind not in (Kind.TAKEN, Kind.OTHER):
                raise
            refusal = error
        return None if self._info(partial) is None else refusal

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        path = self._path(key)
        if nbytes == 0:
            return b""
        stop = None if nbytes is None else start + nbytes

        def send() -> bytes:
            with _translated():
                data: bytes = self._fs.cat_file(path, start=start, end=stop)
            return data

        try:
            data = self._retries.run(key, "read", send)
        except StorageError as error:
            self._explain(error)
            raise
        self.check_version()  # the bytes come without a tag
        if nbytes is None and start and not data:
            info = self.head(key)
            if info is not None and info.nbytes < start:
                raise damaged(f"{self.url}/{key}", info.nbytes, start, None)
        if nbytes is not None and len(data) != nbytes:
            raise damaged(f"{self.url}/{key}", start + len(data), start, nbytes)
        return data

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        data = self.read(key, start, out.nbytes)
        if out.nbytes:
            out[:] = np.frombuffer(data, np.uint8)

    def head(self, key: str) -> BlobInfo | None:
        path = self._path(key)
        return self._retries.run(key, "read", lambda: self._head(path))

    def _head(self, path: str) -> BlobInfo | None:
        info = self._info(path)
        if info is None or info["type"] != "file":
            return None
        version = "|".join(str(info[name]) for name in _TAGS if name in info)
        return BlobInfo(info["size"], f"{info['size']}|{version}", {})

    def _info(self, path: str) -> dict[str, Any] | None:
        """What fsspec knows of a file or folder; None if there is neither."""
        # A cached listing would hide what other workers commit.
        self._fs.invalidate_cache()
        try:
            with _translated():
                info: dict[str, Any] = self._fs.info(path)
        except RequestError as error:
            if error.kind is Kind.MISSING:
                return None
            raise
        return info

    def names(self, prefix: str) -> list[str]:
        return sorted(self._listed(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        return {name: info["size"] for name, info in self._listed(prefix).items() if info["type"] == "file"}

    def _listed(self, prefix: str) -> dict[str, dict[str, Any]]:
        path = self._path(prefix) if prefix else self._root

        def send() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            with _translated():
                listing: list[dict[str, Any]] = self._fs.ls(path, detail=True)
            return listing

        try:
            entries = self._retries.run(prefix, "listed", send)
        except BlobNotFoundError:
            return {}
        # The listing of a file is the file itself.
        folder = path.strip("/") + "/"
        below = ((entry["name"].strip("/"), entry) for entry in entries)
        return {name.removeprefix(folder): entry for name, entry in below if name.startswith(folder)}

    def delete(self, key: str) -> None:
        path = self._path(key)

        def remove() -> None:
            with _translated():
                self._fs.rm_file(path)

        with contextlib.suppress(BlobNotFoundError):
            self._retries.run(key, "deleted", remove)

    def free_nbytes(self) -> int | None:
        return None

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what fsspec classes raise into `RequestError`."""
    try:
        yield
    except Exception as error:  # the errors of fsspec classes have no base in common
        kind = next((kind for kind, types in _KINDS if isinstance(error, types)), Kind.OTHER)
        raise RequestError(kind, reason(error)) from error


_KINDS: Final[tuple[tuple[Kind, tuple[type[Exception], ...]], ...]] = (
    (Kind.MISSING, (FileNotFoundError,)),
    (Kind.TAKEN, (FileExistsError,)),
    (Kind.DENIED, (PermissionError,)),
    (Kind.UNREACHABLE, (ConnectionRefusedError, aiohttp.ClientConnectorError)),
    (Kind.BROKEN, (ConnectionError, TimeoutError, aiohttp.ClientError)),
)
