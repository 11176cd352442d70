"""The stores that a server gives, by name."""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from actstore.errors import JobError, StorageError, StoreReplacedError
from actstore.query.problem import Problem
from actstore.query.server.catalog.served_files import ServedFiles, served_blobs
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.committed_store import CommittedStore
from actstore.store.format.plan import FIRST_RUN
from actstore.store.records.commit import plan_key

NAME: Final = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
"""Of a store. What else a folder may be called cannot be part of a URL as it is."""
_NAME: Final = re.compile(NAME)
_MAX_DEPTH: Final = 4
"""Folders between the root and a store."""
_LOOK_S: Final = 2.0
"""Between two looks at what is committed in a store, while it is asked for."""
_LIST_S: Final = 10.0
"""Between two looks at which stores there are."""
_LOG: Final = logging.getLogger(__name__)


class Catalog:
    """Opens stores when they are asked for, and looks now and then whether they have grown. Threads may share it."""

    def __init__(self, stores: Mapping[str, str], root: str | None, allow_links: Sequence[Path] = ()) -> None:
        """
        Args:
            stores: URL by name.
            root: folder or bucket; stores below it are named by their last component.
            allow_links: folders that links in stores may lead into.

        Raises:
            StorageError: there is no such folder.
        """
        self._allow_links = tuple(allow_links)
        self._named = {name: open_blobs(url).url for name, url in stores.items()}
        self._root = None if root is None else served_blobs(root, self._allow_links)
        if isinstance(self._root, LocalBlobs) and not self._root.root.is_dir():
            raise StorageError(f"there is no folder {self._root.url}; make it first, or correct --root")
        self._below: dict[str, str] = {}
        self.clashes: list[str] = []
        """Of names of stores below the root, each as a sentence."""
        self._warned: set[str] = set()
        self._listed_at = -_LIST_S
        self._listing = threading.Lock()
        self._opened: dict[str, _Opened] = {}
        self._opening = threading.Lock()

    def urls(self) -> dict[str, str]:
        """URL of every store, by name.

        Raises:
            StorageError: the root cannot be listed.
        """
        if self._root is not None and time.monotonic() - self._listed_at > _LIST_S:
            with self._listing:
                if time.monotonic() - self._listed_at > _LIST_S:
                    self._below = self._found(self._root)
                    self._listed_at = time.monotonic()
        return {**self._below, **self._named}

    def _found(self, root: Blobs) -> dict[str, str]:
        found: dict[str, str] = {}
        clashes: list[str] = []
        keys = list(_stores_below(root, "", _MAX_DEPTH, self._warn))
        # A store that comes later takes no name away from one that has it.
        keys.sort(key=lambda key: _url(root, key) not in self._below.values())
        for key in keys:
            name = key.rpartition("/")[2] or root.url.rpartition("/")[2]
            url = _url(root, key)
            if url in self._named.values():
                continue  # under the name that it was given
            if not _NAME.fullmatch(name):
                self._warn(f"{url} is not served: its name can have letters, digits, '.', '_' and '-'")
            elif name in found or self._named.get(name, url) != url:
                clashes.append(f"{self._named.get(name) or found[name]} and {url} are both named {name}")
            else:
                found[name] = url
        for clash in clashes if self._below else ():
            if clash not in self.clashes:
                _LOG.warning("%s; the second one is not served", clash)
        self.clashes = clashes
        return found

    def _warn(self, problem: str) -> None:
        """Once, not whenever stores are listed."""
        if problem not in self._warned:
            self._warned.add(problem)
            _LOG.warning("%s", problem)

    def store(self, name: str) -> CommittedStore:
        """A store, as far as it is committed; the same object until more is.

        Raises:
            Problem: there is none of this name.
            StorageError: it cannot be read.
        """
        return self._of(name).store()

    def look(self, name: str) -> CommittedStore:
        """The same as it is now, even if others look at it, or did a moment ago.

        Raises:
            Problem: there is none of this name.
            StorageError: it cannot be read.
        """
        return self._of(name).look()

    def at_hand(self, name: str) -> CommittedStore | None:
        """The same, if nothing has to be read for it."""
        opened = self._opened.get(self._named.get(name) or self._below.get(name) or "")
        return None if opened is None else opened.at_hand()

    def _of(self, name: str) -> "_Opened":
        url = self._url(name)
        if url is None:
            raise no_store(name)
        with self._opening:
            return self._opened.setdefault(url, _Opened(self._blobs(url)))

    def _blobs(self, url: str) -> Blobs:
        root = self._root
        if not isinstance(root, ServedFiles) or url in self._named.values():
            return served_blobs(url, self._allow_links)
        return root.at(url.removeprefix(root.url).lstrip("/"))

    def _url(self, name: str) -> str | None:
        return self._named.get(name) or self._below.get(name) or self.urls().get(name)

    def forget(self, name: str) -> None:
        """Open a store anew when it is asked for next: another one is in its place."""
        with self._opening:
            self._opened.pop(self._url(name) or "", None)


class _Opened:
    """A store that was asked for."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._lock = threading.Lock()
        self._store: CommittedStore | None = None
        self._looked_at = 0.0

    def at_hand(self) -> CommittedStore | None:
        found = self._store
        return None if time.monotonic() - self._looked_at >= _LOOK_S else found

    def store(self) -> CommittedStore:
        at_hand, found = self.at_hand(), self._store
        if at_hand is not None:
            return at_hand
        # While one looks, others have what was there before.
        if not self._lock.acquire(blocking=found is None):
            assert found is not None
            return found
        try:
            if self._store is not None and time.monotonic() - self._looked_at <= _LOOK_S:
                return self._store
            return self._now()
        finally:
            self._lock.release()

    def look(self) -> CommittedStore:
        with self._lock:
            return self._now()

    def _now(self) -> CommittedStore:
        try:
            self._store = (
                CommittedStore.in_storage(self._blobs) if self._store is None else self._store.newer()
            )
        except StoreReplacedError:
            self._store = CommittedStore.in_storage(self._blobs)
        self._looked_at = time.monotonic()
        return self._store


def _url(root: Blobs, key: str) -> str:
    return f"{root.url}/{key}" if key else root.url


def no_store(name: str) -> Problem:
    """The same whether there is none, or it is not for this client."""
    return Problem(
        404, "store", f"there is no store {name!r} here; GET /v1/stores lists those that there are"
    )


def _stores_below(root: Blobs, prefix: str, depth: int, warn: Callable[[str], None]) -> Iterator[str]:
    """Keys of folders that are stores; nothing is looked for inside of one."""
    here = f"{prefix}/" if prefix else ""
    try:
        is_store = root.head(f"{here}{plan_key(FIRST_RUN)}") is not None
        names = root.names(prefix) if depth and not is_store else []
    except StorageError as error:
        if not prefix:
            raise
        warn(f"{root.url}/{prefix} is not looked into: {error}")
        return
    if is_store:
        yield prefix
    for name in names:
        if not name.startswith((".", "_")) and "\\" not in name:
            yield from _stores_below(root, f"{here}{name}", depth - 1, warn)


def named(arguments: Sequence[str]) -> dict[str, str]:
    """URL by name, from what a user typed: a URL, whose last component is the name, or ``NAME=URL``.

    Raises:
        JobError: two have one name, or a name cannot be part of a URL.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        name, is_named, url = argument.partition("=")
        if not is_named or not _NAME.fullmatch(name):
            url = argument
            name = url.rstrip("/").rpartition("/")[2]
        if not _NAME.fullmatch(name):
            raise JobError(
                f"{argument} has no name that can be part of a URL (letters, digits, '.', '_', '-'); write NAME={url}"
            )
        if name in found:
            raise JobError(f"{found[name]} and {url} are both named {name}; write NAME=URL for one of them")
        found[name] = url
    return found


def check(catalog: Catalog, names: Iterable[str]) -> None:
    """See that these stores can be opened, and the root be listed.

    Raises:
        JobError: two stores below the root have one name.
        StorageError: one cannot be opened.
    """
    catalog.urls()
    if catalog.clashes:
        raise JobError(f"{catalog.clashes[0]}; serve one of them as NAME=URL, or move it")
    for name in names:
        try:
            catalog.store(name)
        except StorageError as error:
            raise StorageError(
                f"the store {name} cannot be served: {error}; every store below a folder is served with --root"
            ) from error
