"""The server answers thousands of generated requests as its OpenAPI document describes."""

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, Response
from schemathesis.checks import CheckContext
from schemathesis.config import GenerationConfig
from schemathesis.core.failures import Failure
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    positive_data_acceptance,
    response_schema_conformance,
)

from actstore.query.server.app import openapi
from actstore.query.wire import RAW, TOKEN_ARRAYS
from tests.query.running import Running
from tests.query.stores import GROWN, NAMES, WHOLE
from tests.store.example import HOOKS, LENGTH, N

pytestmark = pytest.mark.xdist_group("openapi")

Case = schemathesis.Case[Any]
Operation = APIOperation[Any, Any, Any, Any]
Schema = dict[str, Any]

_N_WIDE, _N_NARROW = 20, 60
"""Requests for each operation and way of generating them."""
_BARE: Final = frozenset({"healthz", "readyz", "metrics", "list_stores"})
"""Operations without parameters, which no request can get wrong."""
_OF_HTTP: Final = frozenset(
    {
        "date",
        "content-length",
        "content-type",
        "connection",
        "x-content-type-options",
        "cross-origin-resource-policy",
    }
)
"""Headers that need no description."""


def _list(*values: Any, least: int = 0) -> Schema:
    return {"type": "array", "items": {"enum": list(values)}, "minItems": least, "maxItems": 3}


def _up_to(most: int, least: int = 0) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


_GENERATION: Final = GenerationConfig(with_security_parameters=False)
"""The server has no tokens; tests/query/server/admission/test_access.py has one with tokens."""
_SPAN: Final = {"type": "string", "pattern": "^((0|-?[1-9][0-9]?)?:(0|-?[1-9][0-9]?)?(:-?[1-9])?|[0-7])$"}
_NUMBERS: Final = {"type": "array", "items": _up_to(N - 1, -N), "maxItems": 9}
_GLOB: Final = "blocks.*.hook_resid_post"
_KEY: Final = {
    "enum": [
        "zarr.json",
        "acts/zarr.json",
        f"acts/{HOOKS[0]}/zarr.json",
        f"acts/{HOOKS[0]}/c.0.0.0",
        f"acts/{HOOKS[1]}/c.1.0.0",
        "tokens/c.0.0",
        "_actstore/runs/0000/plan.json",
        "_actstore/manifest.json",
    ]
}
_RANGES: Final = (
    "bytes=0-9",
    "bytes=-5",
    "bytes=7-",
    "bytes=9-3",
    "bytes=0-1,4-5",
    "lines=1-2",
    "bytes=999999-",
)
_THERE: Final[dict[str, Schema]] = {
    "store": {"enum": list(NAMES)},
    "hook": {"enum": [*HOOKS, "resid_post.0", *TOKEN_ARRAYS]},
    **dict.fromkeys(("seq", "pos", "inner", "seqpos"), _SPAN),
    "k": _up_to(3),
    "batch_size": _up_to(99, 1),
    "rank": _up_to(1),
    "world_size": _up_to(3, 1),
    "drop": _list("3", "-1", "5"),
    "tokens": {"enum": ["9,10,11", "3", "77777"]},
    "key": _KEY,
    "Range": {"enum": list(_RANGES)},
}
"""Schemas of parameters for which the stores have data."""
_ALSO: Final = frozenset({"text", "sha"})
"""Parameters that exclude the others."""


def _narrow(document: Schema) -> Schema:
    """The document with schemas for what the stores have, so that a good part of the requests gets data."""
    narrow = copy.deepcopy(document)
    for operation in (operation for path in narrow["paths"].values() for operation in path.values()):
        parameters = [
            parameter for parameter in operation.get("parameters", ()) if parameter["name"] not in _ALSO
        ]
        for parameter in parameters:
            parameter["schema"] = _THERE.get(parameter["name"], parameter["schema"])
            if (parameter["name"], parameter["in"]) == ("hook", "query"):
                parameter["schema"] = _list(*HOOKS, _GLOB, least=1)
            parameter["required"] = parameter["required"] or parameter["name"] == "tokens"
        operation["parameters"] = parameters
    schemas = narrow["components"]["schemas"]
    axis = {"anyOf": [_SPAN, _NUMBERS]}
    hooks = _list(*HOOKS, _GLOB, *TOKEN_ARRAYS, least=1)
    schemas["Select"]["properties"] |= {
        "hooks": hooks,
        "sequences": axis,
        "positions": axis,
        "inner": _SPAN,
    }
    del schemas["Select"]["properties"]["slots"]  # these stores have all positions
    schemas["Pick"]["properties"] |= {
        "hook": {"enum": [*HOOKS, "tokens"]},
        "sequences": _list(0, 5, N - 1, -N, -7, least=3),
        "entries": _list(0, 3, LENGTH - 1, -LENGTH, -2, least=3),
    }
    schemas["PlanRequest"]["properties"]["keys"] = {"type": "array", "items": _KEY, "maxItems": 4}
    return narrow


def _operations(document: Schema) -> dict[str, Operation]:
    """Operations by id."""
    config = schemathesis.Config(seed=1)
    config.projects.default.generation = _GENERATION
    schema = schemathesis.openapi.from_dict(document, config=config)
    operations = {}
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        operations[operation.definition.raw["operationId"]] = operation
    return operations


def _short(part: Any) -> Any:
    """The document without very long texts, which take long to generate; tests/query/server/test_fuzz.py has them."""
    if isinstance(part, dict):
        shortened = {name: _short(value) for name, value in part.items()}
        if isinstance(shortened.get("maxLength"), int):
            shortened["maxLength"] = min(shortened["maxLength"], 300)
        return shortened
    return [_short(value) for value in part] if isinstance(part, list) else part


_WIDE: Final = _operations(_short(openapi()))
"""Operations with all that the document allows, and what it does not."""
_NARROW: Final = _operations(_narrow(openapi()))
_NARROW.pop("compute_activations")  # this server only reads

_EXCLUDED: Final = (
    # Whether a row exists depends on the store.
    positive_data_acceptance,
    # The server has no tokens.
    ignored_auth,
)


class _Undocumented(Failure):
    """A header that is missing in the document."""


def headers_are_documented(_ctx: CheckContext, response: Response, case: Case) -> None:
    """A check for schemathesis: a reply has no header that the document does not name."""
    replies = case.operation.definition.raw["responses"]
    if str(response.status_code) not in replies:
        return  # another check reports it, or it is for another method
    named = {name.lower() for name in replies[str(response.status_code)].get("headers", ())}
    other = response.headers.keys() - named - _OF_HTTP
    if other:
        message = ", ".join(sorted(other))
        raise _Undocumented(operation=case.operation.label, title="Undocumented headers", message=message)


class Fuzzer:
    """Sends cases, and checks the replies."""

    def __init__(self, url: str, session: requests.Session) -> None:
        self._url = url
        self._session = session
        self.statuses: Counter[int] = Counter()
        """Number of replies by status."""

    def __call__(self, case: Case) -> None:
        response = case.call(self._url, session=self._session, timeout=60)
        self.statuses[response.status_code] += 1
        excluded = list(_EXCLUDED)
        if response.status_code == 206:
            excluded.append(response_schema_conformance)  # a range of a document is no document
        case.validate_response(response, additional_checks=[headers_are_documented], excluded_checks=excluded)

    def fuzz(self, operation: Operation, mode: GenerationMode, n: int) -> None:
        """Send generated cases, the same ones in each run."""

        @settings(
            max_examples=n,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case) -> None:
            self(case)

        ask()


@pytest.fixture
def asked(server: Running) -> Iterator[Fuzzer]:
    with requests.Session() as session:
        yield Fuzzer(server.url, session)


@pytest.mark.parametrize("name", _WIDE)
def test_whatever_is_asked(name: str, asked: Fuzzer) -> None:
    operation = _WIDE[name]
    for case in operation.schema.iter_coverage_cases(
        operation, generation_modes=list(GenerationMode), generation_config=_GENERATION
    ):
        asked(case)
    for mode in [GenerationMode.POSITIVE] if name in _BARE else GenerationMode:
        asked.fuzz(operation, mode, _N_WIDE)
    assert asked.statuses.keys() & {404, 405, 422}


@pytest.mark.parametrize("name", _NARROW)
def test_what_there_is(name: str, asked: Fuzzer) -> None:
    asked.fuzz(_NARROW[name], GenerationMode.POSITIVE, _N_NARROW)
    n_answered = sum(n for status, n in asked.statuses.items() if status < 400)
    assert 0 < asked.statuses.total() <= 10 * n_answered, asked.statuses


def test_what_is_not_committed_is_told_by_the_status(server: Running) -> None:
    url = f"{server.url}/v1/stores/{GROWN}"
    path = f"{url}/hooks/{HOOKS[2]}/slice"
    assert requests.get(path, {"seq": f"0:{N}"}, timeout=60).status_code == 200
    for reply in (
        requests.get(path, timeout=60),  # these begin with what is committed
        requests.get(path, {"seq": f"0,{N}"}, timeout=60),
        requests.post(f"{url}/select", json={"hooks": [HOOKS[0], HOOKS[2]]}, timeout=60),
        requests.post(f"{url}/plan", json={"select": {"hooks": [HOOKS[2]]}}, timeout=60),
        requests.post(
            f"{url}/rows", json={"hook": HOOKS[2], "sequences": [0, N], "entries": [0, 0]}, timeout=60
        ),
    ):
        assert reply.status_code == 409
        assert reply.json()["type"] == "urn:actstore:problem:not-committed"


@pytest.mark.parametrize("positions", [[0, 1, 5], [5, 0], [3], [], "::2", "::-1", "4,2", ":"], ids=str)
def test_plans_of_any_positions(positions: Any, server: Running) -> None:
    select = {"hooks": [HOOKS[0]], "sequences": [20, 3, 4], "positions": positions}
    url = f"{server.url}/v1/stores/{WHOLE}"
    plan = requests.post(f"{url}/plan", json={"select": select}, timeout=60).json()
    assembled = bytearray(plan["arrays"][0]["nbytes"])
    for read in plan["reads"]:
        data = Path(plan["places"][read["place"]]["url"]).read_bytes()
        start, stop = read["offset"], read["offset"] + read["nbytes"]
        assembled[read["destination"] : read["destination"] + read["nbytes"]] = data[start:stop]
    given = requests.post(f"{url}/select", json=select, headers={"Accept": RAW}, timeout=60)
    assert bytes(assembled) == given.content
