"""The stores of a server, by name."""

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
from actstore.storage.blobs import Blobs, are_files
from actstore.storage.opening import open_blobs
from actstore.store.committed_store import CommittedStore
from actstore.store.format.plan import FIRST_RUN
from actstore.store.records.commit import plan_key

NAME: Final = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
"""Pattern of the name of a store. A folder with another name cannot be part of a URL as it is."""
_NAME: Final = re.compile(NAME)
_MAX_DEPTH: Final = 4
"""Folders between the root and a store at most."""
_LOOK_S: Final = 2.0
"""Seconds between two looks at what is committed in a store, while clients use it."""
_LIST_S: Final = 10.0
"""Seconds between two listings of the stores."""
_LOG: Final = logging.getLogger(__name__)


class Catalog:
    """Opens stores when clients use them, and looks now and then whether they have grown. Threads may share it."""

    def __init__(self, stores: Mapping[str, str], root: str | None, allow_links: Sequence[Path] = ()) -> None:
        """
        Args:
            stores: URL of each store by name.
            root: folder or bucket; stores below it are named by their last component.
            allow_links: folders that links in stores may lead into.

        Raises:
            StorageError: the root is no folder.
        """
        self._allow_links = tuple(allow_links)
        self._named = {name: open_blobs(url).url for name, url in stores.items()}
        self._root = None if root is None else served_blobs(root, self._allow_links)
        if self._root is not None and are_files(self._root) and not self._root.path("").is_dir():
            raise StorageError(f"there is no folder {self._root.url}; make it first, or correct --root")
        self._below: dict[str, str] = {}
        self.clashes: list[str] = []
        """Sentences about stores below the root that have the same name."""
        self._warned: set[str] = set()
        self._listed_at = -_LIST_S
        self._listing = threading.Lock()
        self._opened: dict[str, _OpenStore] = {}
        self._opening = threading.Lock()

    def urls(self) -> dict[str, str]:
        """URL of every store, by name.

        Raises:
            StorageError: the root cannot be listed.
        """
        if self._root is not None and time.monotonic() - self._listed_at > _LIST_S:
            with self._listing:
                if time.monotonic() - self._listed_at > _LIST_S:
                    self._below = self._list_below(self._root)
                    self._listed_at = time.monotonic()
        return {**self._below, **self._named}

    def _list_below(self, root: Blobs) -> dict[str, str]:
        urls: dict[str, str] = {}
        clashes: list[str] = []
        keys = list(_stores_below(root, "", _MAX_DEPTH, self._warn))
        # A later store takes no name from an earlier one.
        keys.sort(key=lambda key: _url(root, key) not in self._below.values())
        for key in keys:
            name = key.rpartition("/")[2] or root.url.rpartition("/")[2]
            url = _url(root, key)
            if url in self._named.values():
                continue  # it is served under the name that the operator gave
            if not _NAME.fullmatch(name):
                self._warn(f"{url} is not served: its name can have letters, digits, '.', '_' and '-'")
            elif name in urls or self._named.get(name, url) != url:
                clashes.append(f"{self._named.get(name) or urls[name]} and {url} are both named {name}")
            else:
                urls[name] = url
        for clash in clashes if self._below else ():
            if clash not in self.clashes:
                _LOG.warning("%s; the second one is not served", clash)
        self.clashes = clashes
        return urls

    def _warn(self, problem: str) -> None:
        """Log a problem once, not at each listing."""
        if problem not in self._warned:
            self._warned.add(problem)
            _LOG.warning("%s", problem)

    def store(self, name: str) -> CommittedStore:
        """The store, as far as it is committed; the same object until more is.

        Raises:
            Problem: there is no store of this name.
            StorageError: the store cannot be read.
        """
        return self._open(name).store()

    def look(self, name: str) -> CommittedStore:
        """The store as it is now, even if others look at it, or did a moment ago.

        Raises:
            Problem: there is no store of this name.
            StorageError: the store cannot be read.
        """
        return self._open(name).look()

    def cached(self, name: str) -> CommittedStore | None:
        """The store, if it is open and was looked at a moment ago; None otherwise. It reads nothing."""
        opened = self._opened.get(self._named.get(name) or self._below.get(name) or "")
        return None if opened is None else opened.cached()

    def _open(self, name: str) -> "_OpenStore":
        url = self._url(name)
        if url is None:
            raise no_store(name)
        with self._opening:
            return self._opened.setdefault(url, _OpenStore(self._blobs(url)))

    def _blobs(self, url: str) -> Blobs:
        root = self._root
        if not isinstance(root, ServedFiles) or url in self._named.values():
            return served_blobs(url, self._allow_links)
        return root.at(url.removeprefix(root.url).lstrip("/"))

    def _url(self, name: str) -> str | None:
        return self._named.get(name) or self._below.get(name) or self.urls().get(name)

    def forget(self, name: str) -> None:
        """Drop the opened store, so that the next request opens the one in its place."""
        with self._opening:
            self._opened.pop(self._url(name) or "", None)


class _OpenStore:
    """A store that a client has opened, with the time of the last look."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._lock = threading.Lock()
        self._store: CommittedStore | None = None
        self._looked_at = 0.0

    def cached(self) -> CommittedStore | None:
        store = self._store
        return None if time.monotonic() - self._looked_at >= _LOOK_S else store

    def store(self) -> CommittedStore:
        cached, store = self.cached(), self._store
        if cached is not None:
            return cached
        # While one thread looks, others get the store as it was.
        if not self._lock.acquire(blocking=store is None):
            assert store is not None
            return store
        try:
            if self._store is not None and time.monotonic() - self._looked_at <= _LOOK_S:
                return self._store
            return self._refresh()
        finally:
            self._lock.release()

    def look(self) -> CommittedStore:
        with self._lock:
            return self._refresh()

    def _refresh(self) -> CommittedStore:
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
    """The error for a store that does not exist, or that this client may not read; the two look alike."""
    return Problem(
        404, "store", f"there is no store {name!r} here; GET /v1/stores lists those that there are"
    )


def _stores_below(root: Blobs, prefix: str, depth: int, warn: Callable[[str], None]) -> Iterator[str]:
    """Keys of folders that are stores; nothing is listed inside of a store."""
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


def name_stores(arguments: Sequence[str]) -> dict[str, str]:
    """URL of each store by name, from command-line arguments: a URL, whose last component is the name, or ``NAME=URL``.

    Raises:
        JobError: two stores have the same name, or a name cannot be part of a URL.
    """
    urls: dict[str, str] = {}
    for argument in arguments:
        name, is_named, url = argument.partition("=")
        if not is_named or not _NAME.fullmatch(name):
            url = argument
            name = url.rstrip("/").rpartition("/")[2]
        if not _NAME.fullmatch(name):
            raise JobError(
                f"{argument} has no name that can be part of a URL (letters, digits, '.', '_', '-'); write NAME={url}"
            )
        if name in urls:
            raise JobError(f"{urls[name]} and {url} are both named {name}; write NAME=URL for one of them")
        urls[name] = url
    return urls


def check(catalog: Catalog, names: Iterable[str]) -> None:
    """Check that these stores can be opened and that the root can be listed.

    Raises:
        JobError: two stores below the root have the same name.
        StorageError: a store cannot be opened, or the root cannot be listed.
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
