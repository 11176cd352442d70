"""S3 that is busy, loses replies, is slow, cuts bodies, fails for good, or ignores conditions."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import actstore
from tests.conftest import S3Server
from tests.faults.child import Child, run
from tests.faults.conftest import MakeFields, Undisturbed
from tests.faults.fault_plan import Fault, after, always, at_random
from tests.faults.finished import check_finished
from tests.faults.proxy import FaultProxy
from tests.faults.proxy import proxy as fault_proxy

RATE = 0.1
GIVES_UP_WITHIN_S = 60.0

ANY = "GET HEAD PUT POST DELETE"
FAULTS: dict[str, tuple[Fault, str]] = {
    "503": ("refuse", ANY),
    "500": ("break", ANY),
    "lost replies": ("lose reply", ANY),
    "cut bodies": ("cut body", "GET"),
    "slow reads": ("slow body", "GET"),
}
FAST, SLOW = ("503", "lost replies"), ("500", "cut bodies", "slow reads")


@pytest.mark.parametrize("what", [*FAST, *(pytest.param(slow, marks=pytest.mark.faults) for slow in SLOW)])
def test_a_run_over_a_bad_network_completes(
    make_fields: MakeFields,
    undisturbed: Undisturbed,
    s3_url: str,
    s3_server: S3Server,
    proxy: FaultProxy,
    proxied: dict[str, str],
    what: str,
) -> None:
    fields = make_fields(s3_url)
    fault, methods = FAULTS[what]
    # Most of what a run reads is tokens; there are few, so more requests must suffer.
    proxy.plan = at_random(RATE if "PUT" in methods else 0.4, fault, seed=2, methods=methods)
    child = Child(fields, proxied, stop="planned")
    child.reached()
    while_planning = proxy.faults[fault]
    child.go()
    outcome = child.outcome()
    proxy.plan = None
    assert outcome.report, outcome.error
    struck = proxy.faults[fault] - while_planning
    assert struck > 0
    check_finished(s3_url, undisturbed(fields), s3_server)
    # No request is repeated only because its reply is slow.
    assert outcome.report["n_retries"] >= (0 if fault == "slow body" else struck)


@pytest.mark.parametrize(
    "fault",
    [
        "cut body",
        *(pytest.param(slow, marks=pytest.mark.faults) for slow in ("slow body", "refuse", "lose reply")),
    ],
)
def test_reading_over_a_bad_network(
    make_fields: MakeFields,
    s3_url: str,
    s3_environment: dict[str, str],
    proxy: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
) -> None:
    local = make_fields(tmp_path / "store")
    run(local)
    run(make_fields(s3_url), s3_environment)
    monkeypatch.setenv("ACTSTORE_S3", s3_environment["ACTSTORE_S3"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.plan = at_random(0.2, fault, seed=1, methods="GET")
    expected, store = actstore.open(local["out"]), actstore.open(s3_url)
    for hook in expected.hooks:
        assert torch.equal(store[hook][:], expected[hook][:])
        for row in (0, 17, 90):
            assert torch.equal(store[hook][row], expected[hook][row])
    assert proxy.faults[fault] > 0


@pytest.mark.faults
def test_a_store_that_fails_for_good_and_recovers(
    make_fields: MakeFields,
    undisturbed: Undisturbed,
    s3_url: str,
    s3_server: S3Server,
    s3_environment: dict[str, str],
) -> None:
    expected = undisturbed(make_fields(s3_url))
    kinds: list[tuple[Fault, int]] = [
        (fault, n_writes) for fault in ("refuse", "break", "lose reply") for n_writes in (0, 20)
    ]
    # All kinds at once, each with its own proxy: giving up takes long, and is mostly waiting.
    with ExitStack() as stack:
        proxies = [stack.enter_context(fault_proxy(s3_server.endpoint)) for _ in kinds]
        children = []
        for (fault, n_writes), proxy in zip(kinds, proxies, strict=True):
            proxy.plan = after(n_writes, always(fault))
            fields = make_fields(f"{s3_url}/{fault.replace(' ', '-')}-{n_writes}")
            environment = s3_environment | {"AWS_ENDPOINT_URL": proxy.url}
            children.append((fields, environment, Child(fields, environment)))
        for fields, _, child in children:
            error = child.outcome(GIVES_UP_WITHIN_S + child.started - time.monotonic()).error
            assert error.startswith("StorageError: ")
            assert fields["out"] in error
            assert "\n" not in error
        for (fields, environment, _), proxy in zip(children, proxies, strict=True):
            proxy.plan = None
            run(fields, environment)
            check_finished(fields["out"], expected, s3_server)


def test_a_server_that_ignores_conditions(
    make_fields: MakeFields,
    undisturbed: Undisturbed,
    s3_url: str,
    s3_server: S3Server,
    proxy: FaultProxy,
    proxied: dict[str, str],
) -> None:
    fields = make_fields(s3_url)
    proxy.without = ("If-None-Match", "If-Match")
    run(fields, proxied)
    check_finished(s3_url, undisturbed(fields), s3_server)
    # Each object was written once all the same, except the probe that noticed it.
    again = [request for request in proxy.requests if request.method == "PUT" and request.turn > 0]
    assert {request.key.split("/")[1] for request in again} <= {"probe", "manifest.json"}
