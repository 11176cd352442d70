"""Opens the files of a store for a server: those below its folder, and no others."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from actstore.query.server.catalog.beneath import FILE, FOLDER, PATH_ONLY, open_beneath
from actstore.storage.blobs import Blobs, check_key
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.storage.partial_files import is_partial
from actstore.storage.urls import LOCAL, local_path, scheme_of


class ServedFiles(LocalBlobs):
    """`LocalBlobs` that follow no link out of the folder of the store, except into folders that the operator allows.

    Clients get any file of a store, and the writer of a store need not be the operator of the server. Links
    within the folder are followed. The folder itself is wherever the operator says, or below the root that they name.
    """

    def __init__(self, root: Path, key: str = "", allowed: Sequence[Path] = ()) -> None:
        """
        Args:
            root: folder of the store, or one above it, as the operator named it.
            key: path of the store below ``root``; empty if ``root`` is the store.
            allowed: folders that links may lead into.
        """
        super().__init__(root / key if key else root)
        self._named = root
        self._key = key
        self._links = tuple(allowed)
        self._allowed = (self.root, *self._links)

    def at(self, key: str) -> "ServedFiles":
        """The folder at a key as a store of its own: its links do not lead to its neighbours."""
        return ServedFiles(self._named, f"{self._key}/{key}".strip("/"), self._links)

    def _open(self, path: str, flags: int) -> int:
        where = self._named
        try:
            folder = os.open(where, PATH_ONLY | os.O_DIRECTORY)
            try:
                if self._key:
                    below = open_beneath(folder, self._key, PATH_ONLY | os.O_DIRECTORY, (where, *self._links))
                    os.close(folder)
                    folder, where = below, self.root
                return open_beneath(folder, path, flags, self._allowed)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            raise OSError(
                errno.EXDEV,
                f"a link leads out of {where}, and this server does not follow it; put the files themselves there, or "
                "allow the folder that the link leads to with --allow-links",
            ) from error

    def descriptor(self, key: str) -> int:
        """Implements `LocalBlobs.descriptor`."""
        return self._open(check_key(key), FILE)

    def _status(self, key: str) -> os.stat_result:
        descriptor = self._open(check_key(key), PATH_ONLY)
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def names(self, prefix: str) -> list[str]:
        """Implements `LocalBlobs.names`."""
        try:
            return sorted(name for name in self._list(prefix) if not is_partial(name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._explained(error, prefix, "listed") from error

    def _list(self, prefix: str) -> list[str]:
        descriptor = self._open(check_key(prefix) if prefix else ".", FOLDER)
        try:
            with os.scandir(descriptor) as entries:
                return [entry.name for entry in entries]
        finally:
            os.close(descriptor)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Implements `LocalBlobs.sizes`."""
        infos = {name: self.head(f"{prefix}/{name}" if prefix else name) for name in self.names(prefix)}
        return {name: info.nbytes for name, info in infos.items() if info is not None}


def served_blobs(url: str, allowed: Sequence[Path]) -> Blobs:
    """The storage at a URL that an operator named.

    Raises:
        StorageError: the storage cannot be opened, as for `open_blobs`.
    """
    if scheme_of(url) in LOCAL:
        return ServedFiles(local_path(url, "the URL"), "", allowed)
    return open_blobs(url)
