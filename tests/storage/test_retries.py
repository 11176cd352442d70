"""How often a request is repeated."""

from collections.abc import Callable

import pytest

from actstore.errors import StorageError
from actstore.storage import retries
from actstore.storage.blobs import BlobNotFoundError
from actstore.storage.errors import Kind, RequestError
from actstore.storage.retries import MAX_TRIES, Retries
from actstore.testing.blobs import at_once


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Retries:
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.001)
    return Retries("s3://bucket/a")


def failing(*kinds: Kind) -> Callable[[], str]:
    """Fails so, one call each, and then succeeds."""
    left = list(kinds)

    def request() -> str:
        if left:
            raise RequestError(left.pop(0), "reason")
        return "done"

    return request


@pytest.mark.parametrize("kind", [Kind.BROKEN, Kind.BUSY])
def test_transient_failures_are_repeated(run: Retries, kind: Kind) -> None:
    assert run.run("key", "read", failing(kind, kind, kind)) == "done"
    assert run.n == 3


@pytest.mark.parametrize(
    ("kind", "error"),
    [(Kind.MISSING, BlobNotFoundError), (Kind.DENIED, StorageError), (Kind.OTHER, StorageError)],
)
def test_final_failures_are_not(run: Retries, kind: Kind, error: type[Exception]) -> None:
    with pytest.raises(error, match="key"):
        run.run("key", "read", failing(kind))
    assert run.n == 0


def test_it_gives_up(run: Retries) -> None:
    with pytest.raises(StorageError) as caught:
        run.run("key", "read", failing(*[Kind.BROKEN] * 99))
    assert str(caught.value).startswith(
        f"s3://bucket/a/key cannot be read: reason; tried {MAX_TRIES} times in 0."
    )
    assert run.n == MAX_TRIES - 1


def test_server_that_never_answered_is_given_up_soon(run: Retries) -> None:
    with pytest.raises(StorageError, match="the server is not reachable .reason.; tried 3 times"):
        run.run("key", "read", failing(*[Kind.UNREACHABLE] * 99))
    assert run.run("key", "read", failing(Kind.BROKEN)) == "done"
    with pytest.raises(StorageError, match=f"the server is not reachable .reason.; tried {MAX_TRIES} times"):
        run.run("key", "read", failing(*[Kind.UNREACHABLE] * 99))


def test_slow_failures_get_a_second_try_and_no_more(run: Retries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "MAX_SECONDS", 0.0)
    assert run.run("key", "read", failing(Kind.BROKEN)) == "done"
    with pytest.raises(StorageError, match="tried 2 times"):
        run.run("key", "read", failing(*[Kind.BROKEN] * 99))


def test_threads_share_the_count(run: Retries) -> None:
    at_once(lambda _: run.run("key", "read", failing(Kind.BROKEN, Kind.BROKEN)))
    assert run.n == 16


def test_whoever_waits_is_told_why_once_in_a_while(
    run: Retries, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run.run("key", "read", failing(*[Kind.BROKEN] * 5))
    assert not caplog.messages
    monkeypatch.setattr(retries, "TELL_S", 0.0)
    run.run("key", "read", failing(Kind.BROKEN, Kind.BROKEN))
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("s3://bucket/a/key cannot be read: reason; trying again for 0 s now")
    monkeypatch.setattr(retries, "TELL_S", 3600.0)
    run.run("key", "read", failing(Kind.BROKEN))
    assert len(caplog.messages) == 2
