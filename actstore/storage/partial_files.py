"""Partial files: they are written on the disk of their final place, under names that a cleanup recognizes."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from actstore.storage.durable import link_new, make_folder, write

PARTIAL: Final = "_actstore/partial"
"""Folder of files that are not whole yet. What a killed run leaves here is garbage that nobody reads."""
_NOTE: Final = ".elsewhere"
"""Suffix of notes in that folder. A note holds the path, below the root, of a partial file in another folder."""
_SUFFIX: Final = ".partial"
_FOLDERS: Final = frozenset(
    {
        "_actstore",
        "acts",
        "documents",
        "lengths",
        "norms",
        "offsets",
        "parts",
        "positions",
        "roles",
        "tokens",
        "turns",
    }
)
"""Names of all folders that a store has in its root."""


class PartialFiles:
    """Partial files below one root.

    A file can only be linked or renamed within one file system. Where a folder of the root lies on another one (a link,
    a mounted disk), its partial files are in that folder, under names that `is_partial` knows, each with a note in
    `PARTIAL`. Threads may share one.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._elsewhere: set[Path] = set()
        """Folders that the kernel treats as another file system though their device number is that of the root."""

    @contextlib.contextmanager
    def beside(self, path: Path, *, in_its_folder: bool = False) -> Iterator[Path]:
        """Give a new path for the content of the file ``path``; what is still there at the end is removed."""
        own = self._root / PARTIAL / f"{path.name}.{uuid.uuid4().hex}"
        with contextlib.ExitStack() as stack:
            if in_its_folder or self._is_elsewhere(path.parent):
                there = path.parent / f".{own.name}{_SUFFIX}"
                own = own.with_name(own.name + _NOTE)
                stack.callback(_remove, own)
                write(own, [str(there.relative_to(self._root)).encode()])
            else:
                there = own
            stack.callback(_remove, there)
            yield there

    def is_new_elsewhere(self, folder: Path) -> bool:
        """Take note that the kernel refused to move a file into this folder; returns whether that was not known yet."""
        is_new = folder not in self._elsewhere
        self._elsewhere.add(folder)
        return is_new

    def remove_noted(self, note: Path) -> None:
        """Remove the file that a note names, if this is a note. It can name any file; only a partial one is removed."""
        if not note.name.endswith(_NOTE):
            return
        with contextlib.suppress(OSError, ValueError):
            key = Path(note.read_bytes()[:4096].decode())
            if is_partial(key.name) and ".." not in key.parts and not key.is_absolute():
                (self._root / key).unlink()

    def probe(self, folder: Path) -> None:
        """Check that files can be given names in a folder, and that taken names are refused.

        Raises:
            StorageError: that is not so, or the folder is a link that leads nowhere.
            OSError: the folder cannot be written.
        """
        make_folder(folder)
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove_empty_folders)  # a run that is refused leaves nothing behind
            source, target = (
                stack.enter_context(self.beside(folder / "probe", in_its_folder=True)) for _ in range(2)
            )
            write(source, [b"probe"])
            link_new(source, target)

    def linked_folders(self) -> list[Path]:
        """Folders of stores that may be other file systems: links and mounted disks, one and two levels below the root.
        Folders in the root that no store has are left out.
        """
        linked: list[Path] = []
        todo = [self._root]
        while todo:
            folder = todo.pop()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
                device = folder.stat().st_dev
                for entry in entries:
                    if entry.is_file() or (folder == self._root and entry.name not in _FOLDERS):
                        continue
                    if entry.is_symlink() or (entry.is_dir() and entry.stat().st_dev != device):
                        linked.append(Path(entry.path))
                    elif entry.is_dir() and folder == self._root:
                        todo.append(Path(entry.path))
        return sorted(linked)

    def _remove_empty_folders(self) -> None:
        folder = self._root / PARTIAL
        with contextlib.suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()

    def _is_elsewhere(self, folder: Path) -> bool:
        return folder in self._elsewhere or _device(folder) != _device(self._root)


def is_partial(name: str) -> bool:
    """Whether this is the name of a partial file outside of `PARTIAL`."""
    return name.startswith(".") and name.endswith(_SUFFIX)


def _device(folder: Path) -> int:
    """The device number of a folder, or of its nearest parent that exists."""
    while True:
        try:
            return folder.stat().st_dev
        except (FileNotFoundError, NotADirectoryError):
            if folder == folder.parent:
                raise
            folder = folder.parent


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
