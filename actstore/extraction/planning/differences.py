"""What two requests, or two plans, do not agree on."""

import json
from collections.abc import Collection, Iterator
from typing import Any, Final

from actstore.store.format.plan import Plan, Request

# What may differ between two runs of one plan: only how something was spelled, not what it is.
_SPELLINGS: Final = frozenset({"model.name", "model.revision", "tokens.source", "tokens.tokenizer"})
# Follows from what the store has; a job does not know it.
_DERIVED: Final = "tokens.skip_sequences"
OF_A_RUN: Final = frozenset({"hooks", "compression", "covariance"})
"""What two runs over the same tokens can have different."""


def is_same(stored: Plan, made: Plan) -> bool:
    """Whether two plans mean the same store, however names in them were spelled."""
    rest = made.model_copy(update={"request": stored.request})
    return not differences(stored.request, made.request) and stored == rest


def differences(stored: Request, asked: Request, *, but: Collection[str] = ()) -> list[str]:
    """What two requests do not agree on, spelling aside, one sentence each.

    Args:
        stored: of a run in the store.
        asked: of the job.
        but: names of fields that may differ.
    """
    there, here = _flat(stored), _flat(asked)
    return [
        f"{name} is {there.get(name)} in the store, {here.get(name)} was asked for"
        for name in sorted(there.keys() | here.keys())
        if name not in _SPELLINGS
        and name != _DERIVED
        and name not in but
        and there.get(name) != here.get(name)
    ]


def _flat(request: Request) -> dict[str, str]:
    def walk(value: Any, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, below in value.items():
                yield from walk(below, f"{name}.{key}" if name else key)
        else:
            yield name, value if isinstance(value, str) else json.dumps(value)

    fields = request.model_dump(mode="json")
    # The fingerprint covers it; how it is spelled depends on the version of transformers.
    del fields["model"]["config"]
    # One line each, not the whole record, for what has parts of its own.
    fields["hooks"] = ", ".join(hook["name"] for hook in fields["hooks"])
    fields["tokens"]["files"] = ", ".join(
        f"{f['name']} ({f['nbytes']} bytes)" for f in fields["tokens"]["files"]
    )
    return dict(walk(fields, ""))
