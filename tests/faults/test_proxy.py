"""The proxy has the faults that it promises, seen by botocore alone."""

import time
from collections.abc import Iterator
from typing import Any

import botocore.config  # type: ignore[import-untyped]
import botocore.exceptions  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import pytest

from tests.conftest import S3Server
from tests.faults.fault_plan import always, at_random
from tests.faults.proxy import FaultProxy, Throttle


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[Any]:
    """A client without retries, with a short timeout."""
    config = botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=10)
    made = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=proxy.url,
        region_name="us-east-1",
        aws_access_key_id="admin",
        aws_secret_access_key="secret",
        config=config,
    )
    yield made
    made.close()


def put(client: Any, server: S3Server, key: str, body: bytes = b"body", **more: Any) -> Any:
    return client.put_object(Bucket=server.bucket, Key=f"proxy/{key}", Body=body, **more)


def test_signed_requests_pass_unchanged(client: Any, proxy: FaultProxy, s3_server: S3Server) -> None:
    body = bytes(range(256)) * 1000
    put(client, s3_server, "plain", body, Metadata={"who": "me"})
    reply = client.get_object(Bucket=s3_server.bucket, Key="proxy/plain", Range="bytes=1000-299999")
    assert reply["Body"].read() == body[1000:]
    assert reply["Metadata"] == {"who": "me"}
    assert client.head_object(Bucket=s3_server.bucket, Key="proxy/plain")["ContentLength"] == len(body)
    assert [(request.method, request.key) for request in proxy.requests] == [
        ("PUT", "plain"), ("GET", "plain"), ("HEAD", "plain")
    ]  # fmt: skip


@pytest.mark.parametrize(("fault", "status"), [("refuse", 503), ("break", 500)])
def test_refused_writes_have_no_effect(
    client: Any, proxy: FaultProxy, s3_server: S3Server, fault: Any, status: int
) -> None:
    proxy.plan = always(fault)
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        put(client, s3_server, fault)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    proxy.plan = None
    put(client, s3_server, fault, IfNoneMatch="*")


def test_lost_replies_have_their_effect(client: Any, proxy: FaultProxy, s3_server: S3Server) -> None:
    proxy.plan = always("lose reply")
    with pytest.raises(botocore.exceptions.HTTPClientError):
        put(client, s3_server, "lost")
    proxy.plan = None
    with pytest.raises(botocore.exceptions.ClientError, match="PreconditionFailed"):
        put(client, s3_server, "lost", IfNoneMatch="*")
    assert proxy.faults == {"lose reply": 1}


def test_bodies_are_cut(client: Any, proxy: FaultProxy, s3_server: S3Server) -> None:
    put(client, s3_server, "cut", b"x" * 1000)
    proxy.plan = always("cut body")
    reply = client.get_object(Bucket=s3_server.bucket, Key="proxy/cut")
    assert reply["ContentLength"] == 1000
    with pytest.raises(botocore.exceptions.HTTPClientError):
        reply["Body"].read()


def test_a_server_that_ignores_conditions(client: Any, proxy: FaultProxy, s3_server: S3Server) -> None:
    proxy.without = ("If-None-Match",)
    put(client, s3_server, "condition", b"first", IfNoneMatch="*")
    put(client, s3_server, "condition", b"second", IfNoneMatch="*")
    reply = client.get_object(Bucket=s3_server.bucket, Key="proxy/condition")
    assert reply["Body"].read() == b"second"


def test_bodies_keep_the_pace(client: Any, proxy: FaultProxy, s3_server: S3Server) -> None:
    proxy.throttle = Throttle(2_000_000)
    started = time.monotonic()
    put(client, s3_server, "paced", b"x" * 500_000)
    client.get_object(Bucket=s3_server.bucket, Key="proxy/paced")["Body"].read()
    assert time.monotonic() - started > 0.45


def test_random_faults_are_the_same_in_every_run(proxy: FaultProxy) -> None:
    plan = at_random(0.1, "refuse", seed=1, methods="PUT")
    requests = [proxy.came("PUT", f"/bucket/run/{i}")[0] for i in range(1000)]
    struck = [request for request in requests if plan(request)]
    assert 70 < len(struck) < 130
    assert struck == [request for request in reversed(requests) if plan(request)][::-1]
    assert not any(plan(proxy.came("GET", f"/bucket/run/{i}")[0]) for i in range(1000))
