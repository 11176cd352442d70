"""A server as a client sees it: requests that are repeated when that is safe, and errors as those of a local store."""

import http.client
import json
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from pydantic import BaseModel, ValidationError

from actstore.errors import StorageError
from actstore.query.client import bounds, unix
from actstore.query.client.bounds import shown, unexpected
from actstore.query.client.connections import Connections
from actstore.query.client.no_redirects import client_without_redirects
from actstore.query.documents import StoreDocument
from actstore.query.problem import error_of
from actstore.query.wire import CONTENTS, JSON, PROBLEM, STORE
from actstore.reason import reason
from actstore.storage.errors import Kind, RequestError
from actstore.storage.retries import Retries
from actstore.store.reading.identity import Identity, continues, label_of, replaced

_BUSY: Final = frozenset({429, 503, 504})
_PATIENCE_S: Final = 300.0
"""Seconds for a server that is started again, or moved to another machine, while a job reads from it."""
_GIVEN_UP: Final = frozenset({500, 502})
"""Without a document of ours they come from a gateway, or from a server that was ended in the middle of a request."""
_OK: Final = 200
_PART: Final = 206
_DETAIL: Final = 2_000
"""Characters of the detail of a problem at most."""
_MAX_KNOWN: Final = 1_000
"""Labels of contents that are kept; an unknown one is asked for again."""

D = TypeVar("D", bound=BaseModel)
T = TypeVar("T")
Query = Mapping[str, Any]
_NONE: Final[Mapping[str, Any]] = MappingProxyType({})


class Server:
    """One store of a server. Threads may share it."""

    def __init__(self, url: str, token: str | None) -> None:
        """
        Args:
            url: URL of the store, ``http://host:port/v1/stores/name``.
            token: token for the server; None or empty sends none.

        Raises:
            StorageError: the token or the URL is malformed.
        """
        self.url = url.rstrip("/")
        try:
            parts = urlsplit(self.url)
            _ = parts.port
        except ValueError as error:
            raise StorageError(f"{self.url} is no URL: {reason(error)}") from error
        if "@" in parts.netloc:
            raise StorageError(
                "the URL has something before an '@', and servers take no names or passwords there; give a token as "
                "actstore.open(url, token=...) or in ACTSTORE_TOKEN"
            )
        if unix.is_unix(url) and not unix.socket_path(url).startswith("/"):
            raise StorageError(
                f"{self.url} names no Unix socket; write its path with %2F in the place of each '/', as in "
                "http+unix://%2Frun%2Factstore.sock/v1/stores/NAME"
            )
        token = (token or "").strip()
        if not (token.isascii() and token.isprintable()):
            raise StorageError(
                "the token has characters that no token has; give it as it is in the token file"
            )
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.connections = Connections()
        above, _, self._name = self.url.rpartition("/")
        self._retries = Retries(above, patience_s=_PATIENCE_S)
        self._lock = threading.Lock()
        self._nbytes = 0
        self._store: str | None = None
        """Identifies the store, once there was a reply."""
        self._identity: Identity = ()
        """Identity of the largest contents that were seen."""
        self._known: set[str] = set()
        """Labels of contents that were seen to be of this store."""

    @property
    def storage_options(self) -> dict[str, Any]:
        """Options for fsspec, for libraries that read the store over HTTP."""
        options: dict[str, Any] = {"get_client": client_without_redirects}
        return options | {"headers": self._headers} if self._headers else options

    @property
    def n_retries(self) -> int:
        """Requests that were repeated."""
        return self._retries.n

    @property
    def nbytes_read(self) -> int:
        """Bytes of bodies that were read whole."""
        with self._lock:
            return self._nbytes

    def document(
        self,
        kind: type[D],
        path: str,
        query: Query = _NONE,
        request: BaseModel | None = None,
        *,
        most: int = bounds.DOCUMENT_NBYTES,
        most_values: int = bounds.DOCUMENT_VALUES,
    ) -> D:
        """The JSON document of a resource of the store, requested with POST where there is a body.

        Args:
            kind: class of the document.
            path: path of the resource.
            query: query of the URL.
            request: body of the request.
            most: bytes of the document at most.
            most_values: values in the document at most.

        Raises:
            StorageError: there is no such store, or it cannot be read; or what `error_of` makes of the reply.
        """

        def take(reply: http.client.HTTPResponse) -> bytes:
            return bounds.read_document(reply, f"{self.url}{path}", most)

        data = self.take(path, take, query=query, request=request, accept=JSON)
        document = self._parsed(kind, data, path, most_values)
        if isinstance(document, StoreDocument):
            self._learn(document.contents)
        return document

    def _parsed(
        self, kind: type[D], data: bytes, path: str = "", most_values: int = bounds.DOCUMENT_VALUES
    ) -> D:
        where = f"{self.url}{path}"
        # Each further value needs a comma, as lists in lists are refused beyond a depth.
        n_values = data.count(b",") + 1
        if n_values > most_values:
            raise unexpected(where, f"a document of {n_values} values", f"one of at most {most_values}")
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = shown(".".join(map(str, problem["loc"])))
            raise unexpected(
                where, f"a document that is none ({place}: {shown(problem['msg'])})", f"a {kind.__name__}"
            ) from None

    def take(
        self,
        path: str,
        take: Callable[[http.client.HTTPResponse], T],
        *,
        query: Query = _NONE,
        request: BaseModel | None = None,
        accept: str = "*/*",
        headers: Mapping[str, str] = _NONE,
        method: str | None = None,
    ) -> T:
        """What ``take`` makes of a reply. It is called again, with a new reply, when one was cut off.

        Raises:
            StorageError: there is no such store, or it cannot be read; or what `error_of` makes of the reply.
        """
        url = f"{self.url}{quote(path)}" + (f"?{urlencode(query, doseq=True)}" if query else "")
        sent = {**self._headers, "Accept": accept, **headers}
        body = None
        if request is not None:
            body = request.model_dump_json().encode()
            sent["Content-Type"] = JSON
        verb = method or ("GET" if request is None else "POST")

        def ask() -> T:
            with self.connections.request(verb, url, sent, body) as reply:
                self._check_store(reply)
                if reply.status >= 300:
                    self._raise_refusal(reply, url)
                if reply.status != _OK and not (reply.status == _PART and "Range" in headers):
                    raise unexpected(f"{self.url}{path}", f"status {reply.status}", f"status {_OK}")
                return take(reply)

        return self._retries.run(f"{self._name}{path}", "read", ask)

    def _check_store(self, reply: http.client.HTTPResponse) -> None:
        """
        Raises:
            StoreReplacedError: the reply comes from another store than those before.
            RequestError: its store cannot be known yet.
        """
        store, label = reply.getheader(STORE), reply.getheader(CONTENTS) or ""
        with self._lock:
            if self._store is None:
                self._store = store
                self._known = {label}  # the first reply decides which store is opened
            if store is None and self._store is not None and reply.status < 300:
                raise unexpected(self.url, f"a reply without {STORE}", "which store it is of")
            if store is None or (store == self._store and label in self._known):
                return
            if store != self._store:
                raise replaced(self.url)
        self._learn(self._contents())
        with self._lock:
            is_known = label in self._known
        if not is_known:
            raise RequestError(Kind.BROKEN, "one of its processes does not have yet what another one has")

    def _contents(self) -> Identity:
        """Contents of the store now, requested because a reply has an unknown label."""
        with self.connections.request("GET", self.url, {**self._headers, "Accept": JSON}) as reply:
            if reply.status >= 300:
                self._raise_refusal(reply, self.url)
            return self._parsed(StoreDocument, bounds.read_document(reply, self.url)).contents

    def _learn(self, identity: Identity) -> None:
        """
        Raises:
            StoreReplacedError: the store is not the one before.
        """
        with self._lock:
            is_grown = continues(self._identity, identity)
            # One of its processes can be behind another one for a moment.
            if not (is_grown or continues(identity, self._identity)):
                raise replaced(self.url)
            if is_grown:
                self._identity = identity
            if len(self._known) >= _MAX_KNOWN:
                self._known = set()
            self._known.add(label_of(identity))

    def count(self, nbytes: int) -> None:
        """Count the bytes of a body that was read."""
        with self._lock:
            self._nbytes += nbytes

    def _raise_refusal(self, reply: http.client.HTTPResponse, url: str) -> None:
        """
        Raises:
            RequestError: the request may succeed when it is repeated.
            Exception: the error that the reply describes.
        """
        text = bounds.read_problem(reply)
        is_ours = reply.headers.get_content_type() == PROBLEM
        document = _problem(text) if is_ours else None
        if reply.status in _BUSY or (reply.status in _GIVEN_UP and document is None):
            detail = None if document is None else document["detail"]
            raise RequestError(Kind.BROKEN, detail or f"the server answered with status {reply.status}")
        raise error_of(document, reply.status, url)


def _problem(text: bytes) -> dict[str, str] | None:
    """Type and detail of a problem, in one line each; None if the text is no problem."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    return {"type": str(fields.get("type", "")), "detail": shown(fields.get("detail", ""), _DETAIL)}
