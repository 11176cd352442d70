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
from actstore.query.client.connections import Connections
from actstore.query.problem import error_of
from actstore.query.wire import JSON, PROBLEM, STORE
from actstore.store.retries import Retries
from actstore.store.storage_errors import Kind, RequestError

_BUSY: Final = frozenset({429, 503, 504})
_PATIENCE_S: Final = 300.0
"""For a server that is started again, or moved to another machine, while a job reads from it."""
_GATEWAY: Final = 502
_MAX_ERROR: Final = 1 << 16
"""Bytes of a problem."""

D = TypeVar("D", bound=BaseModel)
T = TypeVar("T")
Query = Mapping[str, Any]
_NONE: Final[Mapping[str, Any]] = MappingProxyType({})


class Server:
    """One store of a server. Threads may share it."""

    def __init__(self, url: str, token: str | None) -> None:
        """
        Args:
            url: of the store, ``http://host:port/v1/stores/name``.
            token: that the server wants.

        Raises:
            StorageError: the token cannot be one, or the URL.
        """
        self.url = url.rstrip("/")
        try:
            _ = urlsplit(self.url).port
        except ValueError as error:
            raise StorageError(f"{self.url} is no URL: {error}") from error
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
        """Which one it is, once there was a reply."""

    @property
    def storage_options(self) -> dict[str, Any]:
        """Of fsspec, for others who read the store over HTTP."""
        return {"headers": self._headers} if self._headers else {}

    @property
    def n_retries(self) -> int:
        """Requests that were repeated."""
        return self._retries.n

    @property
    def nbytes_read(self) -> int:
        """Of bodies that were taken whole."""
        with self._lock:
            return self._nbytes

    def document(self, kind: type[D], path: str, query: Query = _NONE, asked: BaseModel | None = None) -> D:
        """The JSON of a resource of the store; POST where something is asked.

        Raises:
            StorageError: there is no such store, or it cannot be read; or what `error_of` makes of the reply.
        """

        def take(reply: http.client.HTTPResponse) -> bytes:
            return reply.read()

        data = self.take(path, take, query=query, asked=asked, accept=JSON)
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise StorageError(
                f"{self.url} does not answer as an actstore server of this version: {problem['loc']}: {problem['msg']}"
            ) from error

    def take(
        self,
        path: str,
        take: Callable[[http.client.HTTPResponse], T],
        *,
        query: Query = _NONE,
        asked: BaseModel | None = None,
        accept: str = "*/*",
        headers: Mapping[str, str] = _NONE,
        method: str | None = None,
    ) -> T:
        """What a function makes of a reply. It is called again, with a new one, when the reply was cut off.

        Raises:
            StorageError: there is no such store, or it cannot be read; or what `error_of` makes of the reply.
        """
        url = f"{self.url}{quote(path)}" + (f"?{urlencode(query, doseq=True)}" if query else "")
        sent = {**self._headers, "Accept": accept, **headers}
        body = None
        if asked is not None:
            body = asked.model_dump_json().encode()
            sent["Content-Type"] = JSON
        verb = method or ("GET" if asked is None else "POST")

        def ask() -> T:
            with self.connections.request(verb, url, sent, body) as reply:
                self._check_store(reply)
                if reply.status >= 300:
                    self._refused(reply, url)
                return take(reply)

        return self._retries.run(f"{self._name}{path}", "read", ask)

    def _check_store(self, reply: http.client.HTTPResponse) -> None:
        """
        Raises:
            StorageError: the reply is of another store than the ones before.
        """
        found = reply.getheader(STORE)
        with self._lock:
            if self._store is None:
                self._store = found
            if found not in (None, self._store):
                raise StorageError(
                    f"{self.url} is another store than it was when it was opened; open it again"
                )

    def count(self, nbytes: int) -> None:
        """Take note of a body that was taken."""
        with self._lock:
            self._nbytes += nbytes

    def _refused(self, reply: http.client.HTTPResponse, url: str) -> None:
        """
        Raises:
            RequestError: it may be answered when it is asked again.
            Exception: what the reply says.
        """
        text = reply.read(_MAX_ERROR)
        is_ours = (reply.getheader("Content-Type") or "").startswith(PROBLEM)
        document = _parsed(text) if is_ours else None
        if reply.status in _BUSY or (reply.status == _GATEWAY and document is None):
            reason = document.get("detail") if isinstance(document, dict) else None
            raise RequestError(Kind.BROKEN, str(reason or f"the server answered with status {reply.status}"))
        raise error_of(document, reply.status, url)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
