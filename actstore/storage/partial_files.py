"""Where the files of a folder lie until they are whole: on the disk that they end up on, and known to cleaners."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from actstore.storage.durable import link_new, make_folder, write

PARTIAL: Final = "_actstore/partial"
"""Where files lie until they are whole. What a killed run leaves here is garbage that nobody reads."""
_NOTE: Final = ".elsewhere"
"""Ends the name of a note in that folder: the file that it names, below the root, is partial, too."""
_SUFFIX: Final = ".partial"
_FOLDERS: Final = frozenset({"_actstore", "acts", "documents", "lengths", "offsets", "parts", "tokens"})
"""All that a store has below its root, but for files."""


class PartialFiles:
    """Partial files below one root.

    A name can only be given within one file system. Where a folder of the root lies on another one (a link, a mounted
    disk), its files are partial in that very folder, under names that `is_partial` knows, each with a note in
    `PARTIAL`. Threads may share it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._elsewhere: set[Path] = set()
        """Folders of which the kernel said that they are another file system, though they do not look like it."""

    @contextlib.contextmanager
    def beside(self, path: Path, *, in_its_folder: bool = False) -> Iterator[Path]:
        """A new name for the content of the file ``path``; what is still there in the end is removed."""
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
        """To be told that the kernel refused to move a file into this folder; whether that was not known yet."""
        is_new = folder not in self._elsewhere
        self._elsewhere.add(folder)
        return is_new

    def remove_noted(self, note: Path) -> None:
        """Remove the file that a note names, if this is one. A note can say anything, so only partial files go."""
        if not note.name.endswith(_NOTE):
            return
        with contextlib.suppress(OSError, ValueError):
            key = Path(note.read_bytes()[:4096].decode())
            if is_partial(key.name) and ".." not in key.parts and not key.is_absolute():
                (self._root / key).unlink()

    def probe(self, folder: Path) -> None:
        """See that names can be given in a folder, and are refused when taken.

        Raises:
            StorageError: they cannot, or it is a link that leads nowhere.
            OSError: it cannot be written.
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
        What else is there is none of ours.
        """
        found: list[Path] = []
        todo = [self._root]
        while todo:
            folder = todo.pop()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
                device = folder.stat().st_dev
                for entry in entries:
                    if entry.is_file() or (folder == self._root and entry.name not in _FOLDERS):
                        continue
                    if entry.is_symlink() or (entry.is_dir() and entry.stat().st_dev != device):
                        found.append(Path(entry.path))
                    elif entry.is_dir() and folder == self._root:
                        todo.append(Path(entry.path))
        return sorted(found)

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
    """Of a folder, or of the one in which it would be made."""
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
