"""The ways in which a request to remote storage can fail, and the error text of each."""

from enum import Enum, auto

from actstore.errors import StorageError


class BlobNotFoundError(StorageError, FileNotFoundError):
    """There is no blob of this key. Any other failure to read raises a plain `StorageError`."""


class DiskFullError(StorageError):
    """A file cannot be written since the disk is full, or the quota of this user is used up."""


class Kind(Enum):
    """The kind of a failure, by what the caller can do about it."""

    TAKEN = auto()
    """The condition of a write does not hold: the key exists already, or has another tag."""
    MISSING = auto()
    NO_BUCKET = auto()
    NO_CREDENTIALS = auto()
    DENIED = auto()
    RANGE = auto()
    """The range of a read begins past the end."""
    UNREACHABLE = auto()
    """No connection was made."""
    BUSY = auto()
    """Another write to this key is under way; it may still fail."""
    BROKEN = auto()
    """The server is overloaded or failed, or the reply was cut off or did not come in time."""
    OTHER = auto()
    """The request failed for another reason."""


TRANSIENT = frozenset({Kind.UNREACHABLE, Kind.BUSY, Kind.BROKEN})
"""Failures after which the same request is worth repeating."""


class RequestError(Exception):
    """One request failed. The classes that send requests handle it or raise what `explained` gives, so users never see
    it.
    """

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


def kind_of_reply(status: int, code: str) -> Kind:
    """The kind of failure that an S3 error reply reports.

    Args:
        status: HTTP status; 0 if unknown.
        code: ``Code`` in the body; empty for replies without a body, such as those to HEAD.

    Source: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
    """
    if code in ("RequestTimeout", "SlowDown", "InternalError") or status >= 500:
        return Kind.BROKEN
    if code == "NoSuchBucket":
        return Kind.NO_BUCKET
    return {
        403: Kind.DENIED,
        404: Kind.MISSING,
        408: Kind.BROKEN,
        409: Kind.BUSY,
        412: Kind.TAKEN,
        416: Kind.RANGE,
        429: Kind.BROKEN,
    }.get(status, Kind.OTHER)


def explained(error: RequestError, url: str, key: str, verb: str) -> StorageError:
    """The error to raise when a failure ends an operation.

    Args:
        error: failure of the last request.
        url: URL of the storage.
        key: key of the blob.
        verb: what could not be done: "written", "read", "listed", "deleted".
    """
    where = f"{url}/{key}"
    match error.kind:
        case Kind.NO_BUCKET:
            return StorageError(f"{url}: the bucket does not exist; create it first, or correct the name")
        case Kind.MISSING:
            return BlobNotFoundError(f"{where} does not exist")
        case Kind.NO_CREDENTIALS:
            return StorageError(
                f"{where} cannot be {verb}: no credentials found; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give this machine a role"
            )
        case Kind.DENIED:
            return StorageError(
                f"{where} cannot be {verb}: access denied to these credentials ({error.reason})"
            )
        case Kind.UNREACHABLE:
            return StorageError(f"{where} cannot be {verb}: the server is not reachable ({error.reason})")
        case Kind.BUSY:
            return StorageError(f"{where} cannot be {verb}: it stays locked by other writers")
        case _:
            return StorageError(f"{where} cannot be {verb}: {error.reason}")


def damaged(where: str, size: int, start: int, nbytes: int | None) -> StorageError:
    """The error for a blob that ends before the requested bytes do.

    Args:
        where: path or URL of the blob.
        size: bytes of the blob.
        start: first byte requested.
        nbytes: number of bytes requested; None for all from ``start`` on.
    """
    expected = start + (nbytes or 0)
    return StorageError(f"{where} has {size} bytes where {expected} were expected; it is damaged")
