"""Blobs on a local or mounted file system: written to a temporary name, synced, then linked create-only."""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from actstore.errors import StorageError
from actstore.store.blobs import BlobNotFoundError
from actstore.store.layout import PAGE
from actstore.store.shard import Bytes, view

PARTIAL = "_actstore/partial"
"""Where files lie until they are whole. What a killed run leaves here is garbage that nobody reads."""
_FOLDER_RETRIES = 20
_DIRECT_NBYTES = 1 << 20
"""Less than this is not worth a trip to the disk of its own."""


class LocalBlobs:
    """Files below one folder; a blob is one file.

    Guarantees: after `create` returns, file and name survive a power cut; a file under its final name is whole.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)
        self._made_root = not self.root.exists()
        """The user's own folder is not ours to remove, even when empty."""

    def path(self, key: str) -> Path:
        return self.root / key

    def create(self, key: str, parts: Sequence[Bytes]) -> bool:
        path = self.path(key)
        try:
            for _ in range(_FOLDER_RETRIES):
                with contextlib.suppress(FileNotFoundError):
                    # Whoever deletes a blob removes the folders that it leaves empty, and they may be these.
                    return self._create(path, parts)
        except StorageError:
            raise
        except OSError as error:
            raise self._explained(error, key, "written") from error
        raise StorageError(f"{path} cannot be written: its folder cannot be made; choose another path")

    def _create(self, path: Path, parts: Sequence[Bytes]) -> bool:
        partial = self.root / PARTIAL / f"{path.name}.{uuid.uuid4().hex}"
        if path.exists():
            # Whoever linked it may have been killed before its name was on disk.
            _sync_folder(path.parent)
            return False
        _make_folder(path.parent)
        try:
            _write(partial, parts)
            _link_new(partial, path)
        except FileExistsError:
            _sync_folder(path.parent)
            return False
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        _sync_folder(path.parent)
        return True

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        """A view of the file's pages: nothing is copied until it is used."""
        try:
            size = self.path(key).stat().st_size
            stop = max(start, size) if nbytes is None else start + nbytes
            if stop > size:
                raise StorageError(
                    f"{self.path(key)} has {size} bytes where {stop} were expected; the file is damaged"
                )
            if stop == start:
                return b""
            return np.memmap(self.path(key), dtype=np.uint8, mode="r", offset=start, shape=(stop - start,))
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise self._explained(error, key, "read") from error

    def size(self, key: str) -> int | None:
        try:
            return self.path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._explained(error, key, "read") from error

    def names(self, prefix: str) -> list[str]:
        try:
            return sorted(os.listdir(self.path(prefix)))  # noqa: PTH208 - names are wanted, not paths
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._explained(error, prefix, "listed") from error

    def delete(self, key: str) -> None:
        path = self.path(key)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        # Folders are ours to make, so empty ones are ours to remove; a full one ends the climb.
        with contextlib.suppress(OSError):
            self.path(PARTIAL).rmdir()
        with contextlib.suppress(OSError):
            for folder in path.parents:
                if (folder == self.root and not self._made_root) or not folder.is_relative_to(self.root):
                    break
                folder.rmdir()

    def free_nbytes(self) -> int | None:
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def _explained(self, error: OSError, key: str, verb: str) -> StorageError:
        path = self.path(key)
        if isinstance(error, FileNotFoundError):
            return BlobNotFoundError(f"{path} does not exist")
        if isinstance(error, PermissionError):
            return StorageError(
                f"{path} cannot be {verb}: no permission; choose a folder that this user may write"
            )
        if isinstance(error, NotADirectoryError | FileExistsError):
            return StorageError(
                f"{path} cannot be {verb}: a file is where a folder is needed; choose another path"
            )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError(
                f"{path} cannot be written: the disk is full; free some space and run the same command again, "
                "it goes on from what is committed"
            )
        return StorageError(f"{path} cannot be {verb}: {error.strerror or error}")


def _write(path: Path, parts: Sequence[Bytes]) -> None:
    descriptor = _open_new(path)
    try:
        for part in parts:
            rest = view(part)
            with _past_the_cache(descriptor, part) as is_direct:
                while rest and is_direct:  # one write takes at most 2 GiB
                    try:
                        n_written = os.write(descriptor, rest)
                    except OSError as error:
                        if error.errno not in (errno.EINVAL, errno.EFAULT):
                            raise
                        break  # this file system takes the flag and not the write
                    rest = rest[n_written:]
                    is_direct = n_written % PAGE == 0
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _past_the_cache(descriptor: int, part: Bytes) -> Iterator[bool]:
    """Whether whole pages can go straight from their memory to the disk here, and the setting for it meanwhile.

    It must reach the disk anyway before the commit. The copy to the page cache would cost the forward memory
    bandwidth, and a run larger than memory would push everybody else's files out of it.
    """
    direct = getattr(os, "O_DIRECT", 0)
    if not direct or isinstance(part, bytes) or part.nbytes < _DIRECT_NBYTES:
        yield False
        return
    places = (part.ctypes.data, part.nbytes, os.lseek(descriptor, 0, os.SEEK_CUR))
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        if any(place % PAGE for place in places):
            raise OSError(errno.EINVAL, "not whole pages")
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct)
    except OSError:
        yield False
        return
    yield True
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def _open_new(path: Path) -> int:
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:
            # Its folder is made when needed, and whoever deletes a blob may remove it again while empty.
            _make_folder(path.parent)


def _link_new(source: Path, target: Path) -> None:
    """Give a finished file its final name, unless that name is taken."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        raise StorageError(
            f"{target} cannot be created: this file system has no hard links, which create-only writes need; "
            "use a local disk, NFS, or object storage"
        ) from error


def _make_folder(folder: Path) -> None:
    """``mkdir -p`` whose new names survive a power cut."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
