"""Types of columns without the ways in which files encode them, and the columns that a file is asked to keep."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from actstore.errors import TokensError


def plain_type(type_: Any) -> pa.DataType:
    """The type of the values: a dictionary, a run or a view is an encoding of them, and an extension is its storage."""
    types: Any = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        return plain_type(type_.storage_type)
    if types.is_dictionary(type_) or types.is_run_end_encoded(type_):
        return plain_type(type_.value_type)
    if types.is_string_view(type_):
        return pa.string()
    if types.is_binary_view(type_):
        return pa.binary()
    if types.is_list(type_):
        return pa.list_(plain_type(type_.value_type))
    if types.is_large_list(type_):
        return pa.large_list(plain_type(type_.value_type))
    if types.is_fixed_size_list(type_):
        fixed: pa.DataType = pa.list_(plain_type(type_.value_type), type_.list_size)
        return fixed
    if types.is_struct(type_):
        return pa.struct([(field.name, plain_type(field.type)) for field in type_])
    plain: pa.DataType = type_
    return plain


def check_there(names: Iterable[str], there: Sequence[str], where: str) -> None:
    """Check that a source has the columns to keep.

    Raises:
        TokensError: it lacks one, or has two of that name; the message lists its columns.
    """
    for name in names:
        if name not in there:
            raise TokensError(f"{where} has no column {name}; its columns are: {', '.join(there)}")
        if (n := there.count(name)) > 1:
            raise TokensError(f"{where} has {n} columns named {name}; give each a name of its own")


def kept_types(names: Iterable[str], schema: pa.Schema, where: str) -> dict[str, pa.DataType]:
    """The types of the columns to keep.

    Raises:
        TokensError: the file lacks one, or has two of that name.
    """
    names = tuple(names)
    check_there(names, schema.names, where)
    return {name: plain_type(schema.field(name).type) for name in names}


def check_same_types(
    types: Mapping[str, pa.DataType], others: Mapping[str, pa.DataType], where: str, other: str
) -> None:
    """Check that columns have the same types in two files. A column of nulls alone, whose type is null, fits all.

    Raises:
        TokensError: they do not.
    """
    for name, type_ in types.items():
        is_null = pa.types.is_null(type_) or pa.types.is_null(others[name])
        if type_ != others[name] and not is_null:
            raise TokensError(
                f"column {name}, which is to be kept, is {type_} in {where} and {others[name]} in {other}; write it "
                "with one type, or leave it out"
            )
