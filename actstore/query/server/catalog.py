"""The stores that a server gives, by name."""

import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from actstore.errors import JobError, StorageError
from actstore.query.problem import Problem
from actstore.store.blobs import Blobs, open_blobs
from actstore.store.commit import plan_key
from actstore.store.local import LocalBlobs
from actstore.store.plan import FIRST_RUN
from actstore.store.store import Store, open_store

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

    def __init__(self, stores: Mapping[str, str], root: str | None) -> None:
        """
        Args:
            stores: URL by name.
            root: folder or bucket; stores below it are named by their last component.

        Raises:
            StorageError: there is no such folder.
        """
        self._named = {name: open_blobs(url).url for name, url in stores.items()}
        self._root = None if root is None else open_blobs(root)
        if isinstance(self._root, LocalBlobs) and not self._root.root.is_dir():
            raise StorageError(f"there is no folder {self._root.url}; make it first, or correct --root")
        self._below: dict[str, str] = {}
        self.clashes: list[str] = []
        """Of names of stores below the root, each as a sentence."""
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
        keys = list(_stores_below(root, "", _MAX_DEPTH))
        # A store that comes later takes no name away from one that has it.
        keys.sort(key=lambda key: _url(root, key) not in self._below.values())
        for key in keys:
            name = key.rpartition("/")[2] or root.url.rpartition("/")[2]
            url = _url(root, key)
            if url in self._named.values():
                continue  # under the name that it was given
            if not _NAME.fullmatch(name):
                _LOG.warning("%s is not served: its name can have letters, digits, '.', '_' and '-'", url)
            elif name in found or self._named.get(name, url) != url:
                clashes.append(f"{self._named.get(name) or found[name]} and {url} are both named {name}")
            else:
                found[name] = url
        for clash in clashes if self._below else ():
            if clash not in self.clashes:
                _LOG.warning("%s; the second one is not served", clash)
        self.clashes = clashes
        return found

    def store(self, name: str) -> Store:
        """A store, as far as it is committed; the same object until more is.

        Raises:
            Problem: there is none of this name.
            StorageError: it cannot be read.
        """
        url = self._named.get(name) or self._below.get(name) or self.urls().get(name)
        if url is None:
            raise no_store(name)
        with self._opening:
            opened = self._opened.setdefault(url, _Opened(url))
        return opened.store()


class _Opened:
    """A store that was asked for."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._store: Store | None = None
        self._looked_at = 0.0

    def store(self) -> Store:
        found = self._store
        if found is not None and time.monotonic() - self._looked_at < _LOOK_S:
            return found
        # While one looks, others have what was there before.
        if not self._lock.acquire(blocking=found is None):
            assert found is not None
            return found
        try:
            if self._store is None:
                self._store = open_store(self._url)
            elif time.monotonic() - self._looked_at > _LOOK_S:
                self._store = self._store.newer()
            self._looked_at = time.monotonic()
            return self._store
        finally:
            self._lock.release()


def _url(root: Blobs, key: str) -> str:
    return f"{root.url}/{key}" if key else root.url


def no_store(name: str) -> Problem:
    """The same whether there is none, or it is not for this client."""
    return Problem(
        404, "store", f"there is no store {name!r} here; GET /v1/stores lists those that there are"
    )


def _stores_below(root: Blobs, prefix: str, depth: int) -> Iterator[str]:
    """Keys of folders that are stores; nothing is looked for inside of one."""
    here = f"{prefix}/" if prefix else ""
    try:
        is_store = root.head(f"{here}{plan_key(FIRST_RUN)}") is not None
        names = root.names(prefix) if depth and not is_store else []
    except StorageError as error:
        if not prefix:
            raise
        _LOG.warning("%s/%s is not looked into: %s", root.url, prefix, error)
        return
    if is_store:
        yield prefix
    for name in names:
        if not name.startswith((".", "_")) and "\\" not in name:
            yield from _stores_below(root, f"{here}{name}", depth - 1)


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
