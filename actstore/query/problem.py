"""Errors of requests: one table of HTTP status, problem type (RFC 9457) and Python error."""

from typing import Any, Final

from actstore.errors import (
    ActstoreError,
    ExtractError,
    HookError,
    JobError,
    LoaderError,
    ModelError,
    NotCommittedError,
    PlanMismatchError,
    StorageError,
    TokensError,
    UncheckedError,
)
from actstore.storage.errors import BlobNotFoundError

LATER: Final = {"Retry-After": "1"}
"""Headers of a problem that goes away by itself."""
_URN: Final = "urn:actstore:problem:"


class Problem(ActstoreError):  # noqa: N818 - the name that RFC 9457 has for it
    """A request that cannot be answered, with the status of the reply. The server raises it; clients get the error
    of the same name in `actstore.errors`.
    """

    def __init__(self, status: int, kind: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.headers = headers or {}

    @classmethod
    def of(cls, error: Exception) -> "Problem":
        """The problem that stands for an error of the library. A `Problem` is returned as it is."""
        if isinstance(error, cls):
            return error
        for kinds, status, kind in _ERRORS:
            if isinstance(error, kinds):
                return cls(status, kind, str(error))
        return cls(500, "bug", f"internal error: {type(error).__name__}; the log of the server says more")

    @property
    def document(self) -> dict[str, Any]:
        """The document of the problem, as RFC 9457 defines it."""
        return {
            "type": _URN + self.kind,
            "title": TITLES[self.kind],
            "status": self.status,
            "detail": str(self),
        }


_ERRORS: Final[tuple[tuple[tuple[type[Exception], ...], int, str], ...]] = (
    ((HookError,), 404, "hook"),
    ((NotCommittedError,), 409, "not-committed"),
    ((LoaderError,), 422, "loader"),
    ((TokensError, ModelError), 422, "tokens"),
    ((JobError,), 422, "invalid"),
    ((PlanMismatchError,), 409, "mismatch"),
    ((ExtractError,), 500, "compute"),
    ((MemoryError,), 413, "too-large"),
    ((StorageError, UncheckedError), 502, "storage"),
)

TITLES: Final = {
    "hook": "The store does not hold this hook",
    "store": "There is no such store",
    "not-committed": "Rows are not committed yet",
    "loader": "There are no such batches",
    "tokens": "The text or the tokens cannot be taken",
    "invalid": "The request is not valid",
    "index": "There are no such sequences or positions",
    "mismatch": "The store is of another model",
    "compute": "The activations cannot be computed",
    "too-large": "More than may be asked for at once",
    "storage": "The storage of the store does not answer as it should",
    "host": "The server has another name",
    "cross-site": "A page of another site asked",
    "token": "A valid token is needed",
    "not-found": "There is nothing here",
    "method": "This method is not for this resource",
    "not-acceptable": "None of the accepted formats can be given",
    "range": "The range cannot be satisfied",
    "too-many": "Too many requests of this client at once",
    "busy": "The server is busy",
    "bug": "Internal error",
}
"""Title of each kind of problem."""

_RAISED: Final[dict[str, type[Exception]]] = {
    "hook": HookError,
    "not-committed": NotCommittedError,
    "loader": LoaderError,
    "tokens": TokensError,
    "index": IndexError,
    "invalid": JobError,
    "mismatch": PlanMismatchError,
    "compute": ExtractError,
}


def error_of(document: Any, status: int, url: str) -> Exception:
    """The error that a client raises for the reply to a request: the one that a store of its own would raise.

    Args:
        document: parsed body of the reply; anything, where the server is not ours.
        status: HTTP status of the reply.
        url: URL of the request.
    """
    fields = document if isinstance(document, dict) else {}
    kind = str(fields.get("type", "")).removeprefix(_URN)
    detail = str(fields.get("detail", ""))
    if kind in _RAISED and detail:
        return _RAISED[kind](detail)
    if kind == "not-found" or (status == 404 and not kind):
        return BlobNotFoundError(detail or f"{url} does not exist")
    if kind == "store" and detail:
        return StorageError(f"{url} cannot be read: {detail}")
    if status in (401, 403):
        return StorageError(
            f"{url} needs a valid token; none was given, or it is not valid, or not any more: give one as "
            "actstore.open(url, token=...) or in ACTSTORE_TOKEN, or ask whoever runs the server"
        )
    return StorageError(f"{url} cannot be read: {detail or f'the server answered with status {status}'}")
