import pytest

from actstore.errors import JobError
from actstore.store.format.dtypes import dtype


@pytest.mark.parametrize(
    ("name", "itemsize"), [("bfloat16", 2), ("float16", 2), ("float32", 4), ("int32", 4), ("int64", 8)]
)
def test_types_are_little_endian(name: str, itemsize: int) -> None:
    assert dtype(name).itemsize == itemsize
    assert dtype(name).storage.newbyteorder("<") == dtype(name).storage


def test_missing_activations_are_loud() -> None:
    assert {dtype(name).fill_value for name in ("bfloat16", "float16", "float32")} == {"NaN"}


def test_unknown_type_names_those_there_are() -> None:
    with pytest.raises(
        JobError, match=r"'float64' is not supported; choose one of bfloat16, float16, float32"
    ):
        dtype("float64")
