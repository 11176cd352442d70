"""What every request passes."""

from actstore.query.server.admission.gate import _let_go


def test_errors_that_name_each_other_are_let_go_of() -> None:
    first, second = ValueError("a"), KeyError("b")
    first.__context__, second.__cause__ = second, first
    _let_go(first)
    assert first.__traceback__ is second.__traceback__ is None
