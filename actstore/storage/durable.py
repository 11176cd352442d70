"""Files and names that survive a power cut, and locks among processes."""

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from actstore.errors import StorageError
from actstore.storage.blobs import Bytes, view

_PAGE: Final = 4096
"""Bytes of a page. Addresses, offsets and sizes of direct writes are multiples of it."""
_DIRECT_NBYTES = 1 << 20
"""Parts of fewer bytes are not worth a direct write."""


def write(path: Path, parts: Iterable[Bytes]) -> None:
    """Write a new file of these parts, which is on the disk when this returns. Its folder is made if needed."""
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
                        break  # this file system accepts the flag but not the write
                    rest = rest[n_written:]
                    is_direct = n_written % _PAGE == 0
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _past_the_cache(descriptor: int, part: Bytes) -> Iterator[bool]:
    """Turn on direct writes of whole pages from memory to the disk meanwhile; gives False where that cannot be.

    The data must reach the disk before the commit anyway. The copy to the page cache would cost the forward memory
    bandwidth, and a run larger than memory would push everybody else's files out of it.
    """
    direct = getattr(os, "O_DIRECT", 0)
    if not direct or isinstance(part, bytes) or part.nbytes < _DIRECT_NBYTES:
        yield False
        return
    places = (part.ctypes.data, part.nbytes, os.lseek(descriptor, 0, os.SEEK_CUR))
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        if any(place % _PAGE for place in places):
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
            # The folder is made when needed, and whoever deletes a blob may remove it again while it is empty.
            make_folder(path.parent)


def link_new(source: Path, target: Path) -> None:
    """Give a finished file its final name, unless that name is taken.

    This makes a hard link; where the file system has none, it is a rename that refuses a taken name.

    Raises:
        FileExistsError: the name is taken.
        StorageError: this file system can do neither.
        OSError: the target is on another file system (EXDEV), or the disk is full, or there is no permission to write.
    """
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_new(source, target)


_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Error numbers by which file systems say that they have no hard links."""
_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1


def _rename_new(source: Path, target: Path) -> None:
    # Python itself has no call for renameat2.
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    failed = errno.ENOSYS
    if rename is not None:
        arguments = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
        if rename(*arguments) == 0:
            return
        failed = ctypes.get_errno()
    if failed not in (*_NO_LINKS, errno.EINVAL):
        raise OSError(failed, os.strerror(failed), str(source), None, str(target))
    raise StorageError(
        f"{target} cannot be created: this file system has neither hard links nor renames that refuse a taken name, "
        "and create-only writes need one of them; use a local disk, NFS, or object storage"
    )


def make_folder(folder: Path) -> None:
    """Make a folder and its parents like ``mkdir -p``; the new names survive a power cut.

    Raises:
        StorageError: one of these names is a link that leads nowhere.
        FileExistsError: one of these names is a file.
    """
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        try:
            new.mkdir()
        except FileExistsError:
            if _is_no_folder(new):
                raise
            check_link(new)
        sync_folder(new.parent)


def check_link(path: Path) -> None:
    """Check that a path is not a link that leads nowhere.

    Raises:
        StorageError: it is one.
    """
    if path.is_symlink() and not path.exists():
        raise StorageError(
            f"{path} is a link to {path.readlink()}, which is not there; mount that disk, or remove the link"
        )


def _is_no_folder(path: Path) -> bool:
    """Whether a path is something other than a folder; False if it does not exist any more."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk; they are there when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, waits: bool = True) -> Iterator[None]:
    """Hold a lock against all other threads and processes, by a file that exists only while the lock is held.

    Raises:
        BlockingIOError: another thread or process holds it, and ``waits`` is false.
        FileNotFoundError: the folder of the file does not exist.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            if not _is_named(descriptor, path):
                continue  # whoever was in has removed it
            try:
                yield
            finally:
                path.unlink()
            return
        finally:
            os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
