"""Blobs on a local or mounted file system: written to a temporary name, synced, then linked or renamed."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.reason import reason
from actstore.storage.blobs import BlobInfo, Bytes, check_key
from actstore.storage.durable import link_new, locked, make_folder, sync_folder, write
from actstore.storage.errors import BlobNotFoundError, DiskFullError, damaged
from actstore.storage.partial_files import PARTIAL, PartialFiles, is_partial
from actstore.storage.pinned import Pinnable

LOCK = f"{PARTIAL}/lock"
"""Key of the file that is locked while a blob is replaced, and then removed. A file that a killed process left locks
nothing.
"""
_FOLDER_RETRIES = 20
_MAPPED_NBYTES = 1 << 20
"""Ranges of fewer bytes are read, since that is faster than mapping them."""


class LocalBlobs(Pinnable):
    """Files below one folder; a blob is one file.

    Guarantees: after `create` or `replace` returns, file and name survive a power cut; a file under its final name is
    whole. Links in the folder are followed, also to other disks. Without hard links, files get their names by renames
    that refuse a taken name (Linux); a file system that has neither is refused. `replace` locks a file, which keeps
    processes apart on local disks and, across machines, on NFSv4.
    """

    n_retries = 0
    is_emulated = False
    is_local = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)
        try:
            self._made_root = not self.root.exists()
            """Whether the folder did not exist before. The user's own folder is not ours to remove, even when empty."""
        except OSError as error:
            raise self._explained(error, "", "read") from error
        self._partial_files = PartialFiles(self.root)

    def signed(self, key: str, seconds: int) -> str | None:  # noqa: ARG002
        """Implements `BlobReader.signed`; files have no such URLs."""
        return None

    def path(self, key: str) -> Path:
        """Implements `FileReader.path`."""
        return self.root / check_key(key) if key else self.root

    def create(
        self,
        key: str,
        parts: Iterable[Bytes],
        *,
        metadata: Mapping[str, str] | None = None,  # noqa: ARG002 - a file system keeps none
    ) -> bool:
        """Implements `Blobs.create`. Parts may be made while they are written; after a failure they are made again."""
        return self._until_folders_stay(key, lambda path, partial: self._create(path, partial, parts))

    def replace(self, key: str, parts: Sequence[Bytes], *, expected: str) -> bool:
        return self._until_folders_stay(
            key, lambda path, partial: self._replace(path, partial, parts, expected)
        )

    def _until_folders_stay(self, key: str, attempt: Callable[[Path, Path], bool]) -> bool:
        path = self.root / check_key(key)
        try:
            for _ in range(_FOLDER_RETRIES):
                try:
                    with self._partial_files.beside(path) as partial:
                        return attempt(path, partial)
                except StorageError:
                    raise  # raised while the parts were made
                except FileNotFoundError:
                    # Whoever deletes a blob removes the folders that it leaves empty, maybe these. A cleanup after
                    # killed writers may have taken our partial file for one of theirs.
                    continue
                except OSError as error:
                    if error.errno != errno.EXDEV or not self._partial_files.is_new_elsewhere(path.parent):
                        raise
        except StorageError:
            raise
        except OSError as error:
            raise self._explained(error, key, "written") from error
        raise StorageError(
            f"{path} cannot be written: its folder cannot be made or does not stay; choose another"
        )

    def _create(self, path: Path, partial: Path, parts: Iterable[Bytes]) -> bool:
        if path.exists():
            # Whoever linked it may have been killed before its name was on disk.
            sync_folder(path.parent)
            return False
        make_folder(path.parent)
        write(partial, parts)
        is_ours = True
        try:
            link_new(partial, path)
        except FileExistsError:
            # On NFS, the link may have been made and the reply lost, and then the kernel tries again.
            is_ours = path.samefile(partial)
        sync_folder(path.parent)
        return is_ours

    def _replace(self, path: Path, partial: Path, parts: Sequence[Bytes], expected: str) -> bool:
        if _tag(path) != expected:
            return False
        write(partial, parts)
        with locked(self.root / LOCK):
            if _tag(path) != expected:
                return False
            partial.replace(path)
        sync_folder(path.parent)
        return True

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        """Implements `BlobReader.read`. A large range is a view of the file's pages, copied only when it is used."""
        with self._opened(key) as descriptor:
            n_left = self._check_range(descriptor, key, start, nbytes)
            nbytes = n_left if nbytes is None else nbytes
            if nbytes >= _MAPPED_NBYTES:
                with open(descriptor, "rb", closefd=False) as file:
                    return np.memmap(file, dtype=np.uint8, mode="r", offset=start, shape=(nbytes,))
            data = os.pread(descriptor, nbytes, start)
            if len(data) != nbytes:
                raise damaged(str(self.path(key)), start + len(data), start, nbytes)
            return data

    def read_and_head(self, key: str) -> tuple[Bytes, BlobInfo]:
        """Implements `FileReader.read_and_head`."""
        with self._opened(key) as descriptor:
            data = os.pread(descriptor, self._check_range(descriptor, key, 0, None), 0)
            return data, _info(os.fstat(descriptor))

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        rest, place = memoryview(out.data), start
        with self._opened(key) as descriptor:
            self._check_range(descriptor, key, start, out.nbytes)
            while rest:  # one read gives at most 2 GiB
                n_read = os.preadv(descriptor, [rest], place)
                if not n_read:
                    raise damaged(str(self.path(key)), place, start, out.nbytes)
                rest, place = rest[n_read:], place + n_read

    def descriptor(self, key: str) -> int:
        """Implements `FileReader.descriptor`."""
        # O_NONBLOCK changes nothing for files; without it, opening a pipe would wait for a writer.
        return os.open(f"{self.url}/{check_key(key)}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        try:
            descriptor = self.descriptor(key)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except StorageError:
            raise
        except OSError as error:
            storage_error = self._explained(error, key, "read")
            self._explain(storage_error)
            raise storage_error from error

    def _check_range(self, descriptor: int, key: str, start: int, nbytes: int | None) -> int:
        """The number of bytes from ``start`` on.

        Raises:
            StorageError: this is not a file, or it ends before ``start + nbytes``.
            StoreReplacedError: the file may be of another version.
        """
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(f"{self.path(key)} is no file; put the file that was there back")
        if self._version is not None:
            # This open file is the one that is read, whatever file gets its name meanwhile.
            self._version.seen(key, _tag_of(status))
        size = status.st_size
        if size < start + (nbytes or 0):
            raise damaged(str(self.path(key)), size, start, nbytes)
        return size - start

    def head(self, key: str) -> BlobInfo | None:
        try:
            status = self._status(key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._explained(error, key, "read") from error
        if not stat.S_ISREG(status.st_mode):
            return None
        return _info(status)

    def _status(self, key: str) -> os.stat_result:
        return (self.root / check_key(key)).stat()

    def names(self, prefix: str) -> list[str]:
        return sorted(entry.name for entry in self._entries(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        sizes = {}
        for entry in self._entries(prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted since
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
        return sizes

    def _entries(self, prefix: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.path(prefix)) as entries:
                return [entry for entry in entries if not is_partial(entry.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._explained(error, prefix, "listed") from error

    def delete(self, key: str) -> None:
        path = self.root / check_key(key)
        if path == self.root / LOCK:
            # A lock that is held must stay: another process would make a new file and lock that.
            with contextlib.suppress(FileNotFoundError, BlockingIOError), locked(path, waits=False):
                pass
            return
        if key.startswith(f"{PARTIAL}/"):
            self._partial_files.remove_noted(path)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise self._explained(error, key, "deleted") from error
        # We make folders, so we remove empty ones, up to the first that is not empty.
        with contextlib.suppress(OSError):
            self.path(PARTIAL).rmdir()
        with contextlib.suppress(OSError):
            for folder in path.parents:
                if (folder == self.root and not self._made_root) or not folder.is_relative_to(self.root):
                    break
                folder.rmdir()

    def probe_folders(self) -> None:
        """Implements `Blobs.probe_folders` for folders that are links or mounted disks."""
        for folder in self._partial_files.linked_folders():
            try:
                self._partial_files.probe(folder)
            except StorageError:
                raise
            except OSError as error:
                raise self._explained(error, str(folder.relative_to(self.root)), "written") from error

    def free_nbytes(self) -> int | None:
        folder = self.root / "acts"  # which may be on another disk
        while True:
            try:
                return shutil.disk_usage(folder).free
            except (FileNotFoundError, NotADirectoryError):
                folder = folder.parent  # not made yet, or removed with its last blob
            except OSError as error:
                raise self._explained(error, "", "read") from error

    def _explained(self, error: OSError, key: str, verb: str) -> StorageError:
        path = self.path(key)
        if isinstance(error, FileNotFoundError):
            return BlobNotFoundError(f"{path} does not exist")
        if isinstance(error, PermissionError):
            advice = (
                "choose a folder that this user may write"
                if verb == "written"
                else "give this user the right to it"
            )
            return StorageError(f"{path} cannot be {verb}: no permission; {advice}")
        if isinstance(error, NotADirectoryError | FileExistsError):
            return StorageError(
                f"{path} cannot be {verb}: a file is where a folder is needed; choose another path"
            )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFullError(
                f"{path} cannot be written: the disk is full; free some space and run the same command again, "
                "it goes on from what is committed"
            )
        return StorageError(f"{path} cannot be {verb}: {reason(error)}")


def _tag(path: Path) -> str | None:
    try:
        return _tag_of(path.stat())
    except FileNotFoundError:
        return None


def _info(status: os.stat_result) -> BlobInfo:
    return BlobInfo(status.st_size, _tag_of(status), {}, lasting_tag=_lasting_tag_of(status))


def _tag_of(status: os.stat_result) -> str:
    return f"{status.st_ino}-{_lasting_tag_of(status)}"


def _lasting_tag_of(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"
