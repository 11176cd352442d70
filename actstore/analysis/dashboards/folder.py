"""The folder of a dashboard: what it was made of comes first, the index last, and nothing is overwritten."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from actstore.errors import StorageError
from actstore.storage.blobs import Blobs
from actstore.storage.opening import open_blobs
from actstore.storage.partial_files import PARTIAL

ABOUT: Final = "dashboard.json"
INDEX: Final = "index.html"
FEATURES: Final = "features"
_WRITERS: Final = 16
"""Files that are written at the same time: each waits until it is on disk."""


@dataclass(frozen=True)
class Folder:
    """A folder that is new, or holds a part of this very dashboard."""

    blobs: Blobs

    @classmethod
    def opened(cls, out: str, about: dict[str, Any]) -> "Folder":
        """Open a folder, or begin it.

        Args:
            out: path or URL.
            about: what the dashboard is made of; an entry ``identity`` differs for all others.

        Raises:
            StorageError: there is something else in it, or it cannot be written.
        """
        blobs = open_blobs(out)
        names = [name for name in blobs.names("") if name != PARTIAL.partition("/")[0]]
        if names and ABOUT not in names:
            raise StorageError(
                f"{blobs.url} holds {names[0]} and no dashboard; give an empty folder, or one that does not exist"
            )
        if names == [ABOUT] and _identity(bytes(blobs.read(ABOUT))) != about["identity"]:
            blobs.delete(ABOUT)  # an earlier call ended before it had made anything
        blobs.create(ABOUT, [json.dumps(about, indent=2).encode()])
        if _identity(bytes(blobs.read(ABOUT))) != about["identity"]:
            raise StorageError(
                f"{blobs.url} holds a dashboard of other features, rows or options; give another folder, or delete "
                "that one"
            )
        return cls(blobs)

    @property
    def is_complete(self) -> bool:
        """Whether the index is there, which is written last."""
        return INDEX in self.blobs.names("")

    def write_pages(
        self, pages: Iterable[tuple[int, Callable[[], bytes]]], on_page: Callable[[], None] | None
    ) -> int:
        """Write the pages that are not there.

        Args:
            pages: number of each feature, and what makes its page.
            on_page: called after each page, also those that were there.

        Returns:
            How many were there.

        Raises:
            StorageError: a page cannot be written.
        """
        there = set(self.blobs.names(FEATURES))
        n_before = 0

        def write(number: int, made: bytes) -> None:
            self.blobs.create(f"{FEATURES}/{number}.html", [made])

        with ThreadPoolExecutor(_WRITERS) as writers:
            waiting = []
            for number, make in pages:
                if f"{number}.html" in there:
                    n_before += 1
                    if on_page is not None:
                        on_page()
                    continue
                waiting.append(writers.submit(write, number, make()))
                if len(waiting) > 4 * _WRITERS:
                    waiting.pop(0).result()
                    if on_page is not None:
                        on_page()
            for written in waiting:
                written.result()
                if on_page is not None:
                    on_page()
        return n_before

    def write(self, name: str, data: bytes) -> None:
        """Write another file, unless it is there."""
        self.blobs.create(name, [data])


def _identity(about: bytes) -> Any:
    try:
        document = json.loads(about)
    except ValueError:
        return None
    return document.get("identity") if isinstance(document, dict) else None
