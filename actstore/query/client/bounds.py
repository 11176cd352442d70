"""Limits on how much a server may send, and how slowly: they are checked before memory is allocated."""

import http.client
import re
from typing import Final

from actstore.errors import StorageError
from actstore.storage.errors import Kind, RequestError

READ_S: Final = 120.0
"""Seconds until the head of a reply is there, and again until its body is, with `SLOWEST`. A server answers, or replies
that it is busy, sooner.
"""
SLOWEST: Final = 16 << 10
"""Bytes a second of a body: each time as much has come, one second more is given."""
HEAD_NBYTES: Final = 1 << 20
"""Bytes before a body at most, with all headers and replies that only announce another one."""
PROBLEM_NBYTES: Final = 1 << 16
"""Bytes of a problem at most; of a larger one, only the status is reported."""
DOCUMENT_NBYTES: Final = 64 << 20
"""Bytes of a document at most."""
DOCUMENT_VALUES: Final = 1 << 20
"""Values in a document at most. They take far more memory than their text, and as errors some 400 bytes each."""
OBJECT_NBYTES: Final = 256 << 20
"""Bytes of an object at most that is read as a whole, without knowing its size: a record, or a table of shards."""
SEGMENTS: Final = 1 << 24
"""Committed segments at most of a run that is not complete. Each is an object in storage."""
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_SHOWN: Final = 100


def shown(text: object, longest: int = _SHOWN) -> str:
    """Untrusted text as an error message shows it: one line of printable characters."""
    one_line = " ".join(str(text)[: 4 * longest].split())
    printable = "".join(c if c.isprintable() else "?" for c in one_line)
    return printable if len(printable) <= longest else f"{printable[:longest]}..."


def unexpected(where: str, came: str, expected: str) -> StorageError:
    """The error for a reply that no server of ours gives.

    Args:
        where: URL of the request.
        came: what came instead.
        expected: what a server of ours gives.
    """
    return StorageError(
        f"{where} gave {came} where {expected} was expected; it is no actstore server of this version, or something "
        "between changes its replies: tell whoever runs it"
    )


def announced(reply: http.client.HTTPResponse, where: str) -> int:
    """Length in bytes that a reply announces. No more of it is read.

    Raises:
        StorageError: there is no length, or it is no number.
    """
    lengths = {value.strip() for value in reply.headers.get_all("Content-Length") or ()}
    length = lengths.pop() if len(lengths) == 1 and not reply.chunked else ""
    if not _LENGTH.fullmatch(length):
        given = ", ".join(map(repr, reply.headers.get_all("Content-Length") or ()))
        came = f"the Content-Length {shown(given)}" if given else "a reply without a Content-Length"
        raise unexpected(where, came, "the number of its bytes")
    return int(length)


def check_length(reply: http.client.HTTPResponse, where: str, expected: int) -> None:
    """See that a reply has the length that what was asked for has.

    Raises:
        StorageError: the length is another one.
    """
    length = announced(reply, where)
    if length != expected:
        raise unexpected(where, f"{length} bytes", f"{expected} bytes")


def read_document(reply: http.client.HTTPResponse, where: str, most: int = DOCUMENT_NBYTES) -> bytes:
    """Read all of a body that is not too long.

    Raises:
        RequestError: the reply was cut off.
        StorageError: the reply is longer.
    """
    length = announced(reply, where)
    if length > most:
        raise unexpected(where, f"{length} bytes", f"a document of at most {most}")
    data = reply.read(length)
    if len(data) < length:
        raise RequestError(Kind.BROKEN, "the reply was cut off")
    return data


def read_problem(reply: http.client.HTTPResponse) -> bytes:
    """The body of an error; empty where it is too long, or has no length."""
    if reply.chunked or reply.length is None or reply.length > PROBLEM_NBYTES:
        return b""
    return reply.read(reply.length)
