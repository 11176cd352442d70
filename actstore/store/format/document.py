"""The common base of the JSON documents of a store."""

import json
import re
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from actstore.errors import StorageError
from actstore.reason import reason
from actstore.storage.blobs import BlobNotFoundError, BlobReader
from actstore.store.format.layout import to_json
from actstore.store.format.shard import crc32c

FORMAT: Final = 1
"""Version of the store format. Readers refuse a higher one."""
_MAX_NBYTES: Final = 1 << 30
"""The most bytes of a document, far above any real one: parsed JSON takes several times its size in memory."""
_SHOWN: Final = 100
"""Characters of a damaged document that an error message repeats."""
_HEAD = re.compile(rb'\{\n  "checksum": (0|[1-9][0-9]{0,9}),\n')
"""The first line of every document, with the CRC-32C of all bytes behind it."""


class Document(BaseModel):
    """A frozen JSON document. Unknown fields and fields of the wrong type are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    def to_bytes(self) -> bytes:
        """The canonical bytes of this document, with the checksum in front."""
        body = self._json().removeprefix(b"{\n")
        return b'{\n  "checksum": %d,\n' % crc32c(body) + body

    def _json(self) -> bytes:
        """The canonical bytes of this document alone."""
        return to_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Parse a document that was read from ``where``.

        Raises:
            StorageError: the document is damaged, or of a newer format.
        """
        try:
            if len(data) > _MAX_NBYTES:
                raise StorageError(f"{where} has {len(data)} bytes, more than any document of a store has")
            fields = json.loads(data, object_pairs_hook=_once, parse_constant=_no_number)
            check_format(fields, where)
            head = _HEAD.match(data)
            if head is None:
                raise StorageError(f"{where} is damaged: it does not begin with its checksum")
            checksum = crc32c(data[head.end() :])
            if checksum != int(head[1]):
                raise StorageError(
                    f"{where} is damaged: its checksum is {int(head[1])} and its content gives {checksum}"
                )
            return cls.model_validate_json(b"{" + data[head.end() :])
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            place = _shown(".".join(str(part) for part in problem["loc"]))
            raise StorageError(f"{where} is damaged: {place}: {problem['msg']}") from error
        except (ValueError, RecursionError) as error:
            # Not UTF-8, not JSON, a number of a million digits, or lists nested too deep.
            raise StorageError(f"{where} is damaged: it is not JSON ({reason(error)})") from error

    @classmethod
    def read(cls, blobs: BlobReader, key: str) -> Self:
        """Read and parse a document.

        Raises:
            BlobNotFoundError: there is no such document.
            StorageError: the document is damaged, of a newer format, or cannot be read.
        """
        return cls.from_bytes(bytes(blobs.read(key)), f"{blobs.url}/{key}")

    @classmethod
    def read_if_there(cls, blobs: BlobReader, key: str) -> Self | None:
        """Read and parse a document; None if there is none."""
        try:
            return cls.read(blobs, key)
        except BlobNotFoundError:
            return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a repeated key: readers disagree on which of two values to take."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has a repeated key")
    return fields


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _shown(text: str) -> str:
    """Quote text of unknown origin in a message."""
    return "".join(c if c.isprintable() else "?" for c in text[:_SHOWN])


def check_format(fields: Any, where: str) -> None:
    """Refuse documents of a later version of actstore.

    Raises:
        StorageError: the document has a later format, or none.
    """
    version = fields.get("format") if isinstance(fields, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise StorageError(f"{where} is not an actstore document: it has no integer field 'format'")
    if version > FORMAT:
        raise StorageError(
            f"{where} is of store format {version}, and this actstore reads up to {FORMAT}; "
            "upgrade with `pip install -U actstore`"
        )
