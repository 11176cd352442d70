"""The gate that every request passes."""

import gc
import weakref

from actstore.query.server.admission.gate import _drop_tracebacks


def test_errors_that_name_each_other_lose_their_tracebacks() -> None:
    first, second = ValueError("a"), KeyError("b")
    first.__context__, second.__cause__ = second, first
    _drop_tracebacks(first)
    assert first.__traceback__ is second.__traceback__ is None


class _Rest:
    """The rest of a reply."""


def test_an_error_that_is_kept_holds_no_rest_of_a_reply() -> None:
    """No collection runs here: memory must be free as soon as the reply has failed."""

    def send(_rest: _Rest) -> None:
        raise OSError("the client is gone")

    def reply() -> None:
        rest = _Rest()
        seen.append(weakref.ref(rest))
        try:
            send(rest)
        except OSError as error:
            raise RuntimeError("cut off") from error

    seen: list[weakref.ref[_Rest]] = []
    errors: list[BaseException] = []
    was_on = gc.isenabled()
    gc.disable()
    try:
        try:
            reply()
        except RuntimeError as error:
            errors.append(error)
        assert seen[0]() is not None  # the frames of the error and of its cause hold it
        _drop_tracebacks(errors[0])
        assert seen[0]() is None
    finally:
        if was_on:
            gc.enable()
