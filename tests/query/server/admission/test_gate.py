"""The gate that every request passes."""

from actstore.query.server.admission.gate import _drop_tracebacks


def test_errors_that_name_each_other_lose_their_tracebacks() -> None:
    first, second = ValueError("a"), KeyError("b")
    first.__context__, second.__cause__ = second, first
    _drop_tracebacks(first)
    assert first.__traceback__ is second.__traceback__ is None
