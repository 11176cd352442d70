"""Differences between two requests, or between two plans."""

import json
from collections.abc import Collection, Iterator
from typing import Any, Final

from actstore.extraction.planning.tokenising.source_files import are_same
from actstore.store.format.plan import Plan, Request
from actstore.store.format.remembered import remembered

# Fields that may differ between two runs of one plan: they spell something, but do not decide what it is.
_SPELLINGS: Final = frozenset({"model.name", "model.revision", "tokens.source", "tokens.tokenizer"})
# These fields follow from what is in the store; a job does not know them. Earlier versions made batches in stored
# order.
_DERIVED: Final = frozenset({"tokens.skip_sequences", "batching"})
OF_A_RUN: Final = frozenset({"hooks", "compression", "covariance"})
"""Fields that may differ between two runs over the same tokens."""


def is_same(stored: Plan, made: Plan) -> bool:
    """Whether two plans describe the same run, however names in them are spelled."""
    rest = made.model_copy(update={"request": stored.request})
    return not differences(stored.request, made.request) and stored == rest


def differences(stored: Request, asked: Request, *, but: Collection[str] = ()) -> list[str]:
    """The differences between two requests, one sentence each. Spellings do not count.

    Args:
        stored: request of a run in the store.
        asked: request of the job.
        but: names of fields that may differ.
    """
    there, here = _flat(stored), _flat(asked)
    return [
        f"{name} is {there.get(name)} in the store, {here.get(name)} was asked for"
        for name in sorted(there.keys() | here.keys())
        if name not in _SPELLINGS
        and name not in _DERIVED
        and name not in but
        and there.get(name) != here.get(name)
        and not _is_earlier_cut(name, there.get(name), here.get(name))
        and not (name == "tokens.files" and are_same(stored.tokens.files, asked.tokens.files))
    ]


def _is_earlier_cut(name: str, there: str | None, here: str | None) -> bool:
    """Whether a store was made without `truncate`: nothing was too long, or an earlier version cut it at the right."""
    return name == "tokens.truncate" and there is None and here == "right"


@remembered
def _flat(request: Request) -> dict[str, str]:
    def walk(value: Any, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, below in value.items():
                yield from walk(below, f"{name}.{key}" if name else key)
        else:
            yield name, value if isinstance(value, str) else json.dumps(value)

    fields = request.model_dump(mode="json")
    # The fingerprint covers the configuration, whose spelling depends on the version of transformers.
    del fields["model"]["config"]
    # Lists of records are one line each.
    fields["hooks"] = ", ".join(hook["name"] for hook in fields["hooks"])
    fields["tokens"]["keep"] = ", ".join(request.tokens.keep) or "none"
    fields["tokens"]["files"] = ", ".join(
        f"{file.name} ({file.nbytes} bytes{'' if file.crc32c is None else f', CRC-32C {file.crc32c:08x}'})"
        for file in request.tokens.files
    )
    return dict(walk(fields, ""))
