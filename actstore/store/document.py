"""The JSON documents of a store: what they have in common."""

import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from actstore.errors import StorageError
from actstore.store.layout import to_json

FORMAT = 1
"""Version of the store format. A reader refuses a higher one."""


class Document(BaseModel):
    """A frozen JSON document; unknown fields and fields of another type are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    def to_bytes(self) -> bytes:
        return to_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Parse a document read from ``where``.

        Raises:
            StorageError: it is damaged, or of a newer format.
        """
        try:
            check_format(json.loads(data), where)
            return cls.model_validate_json(data)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise StorageError(f"{where} is damaged: {place}: {problem['msg']}") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise StorageError(f"{where} is damaged: it is not JSON ({error})") from error


def check_format(fields: Any, where: str) -> None:
    """Refuse what a later version of actstore wrote.

    Raises:
        StorageError: it says so.
    """
    version = fields.get("format") if isinstance(fields, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise StorageError(f"{where} is not an actstore document: it has no integer field 'format'")
    if version > FORMAT:
        raise StorageError(
            f"{where} is of store format {version}, and this actstore reads up to {FORMAT}; "
            "upgrade with `pip install -U actstore`"
        )
