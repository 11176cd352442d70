"""Checking the sizes in a model's configuration before anything is made from them: anybody can have written it."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from actstore.errors import ModelError

_MAX_COUNTS: Final = {
    "layer": 1000,
    "num_block": 1000,
    "attention_types": 1000,
    "expert": 100_000,
    "label": 100_000,
    "head": 100_000,
    "hidden_size": 10_000_000,
    "n_embd": 10_000_000,
    "vocab": 1_000_000_000,
}
"""The largest count that is accepted, by a part of the field's name; no model comes near. transformers makes a list of
layers, experts and labels, item by item, as soon as it sees their number."""
_NO_COUNTS: Final = ("per_layer", "window", "_dim", "_token")
"""Parts of names of fields that do not count layers, heads or experts, whatever else is in the name."""
_MAX_INTEGER: Final = 1 << 40
_POSITIVE: Final = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("num_attention_heads", "n_head", "n_heads", "num_heads"),
    *("hidden_size", "n_embd", "vocab_size", "num_key_value_heads"),
    *("intermediate_size", "max_position_embeddings", "n_positions"),
)
"""Names that families give to sizes. Where such a field exists, it is a whole number of 1 or more, or null."""


def check_sizes(fields: Mapping[str, Any], where: str, remedy: str) -> None:
    """Check that the sizes in a configuration are ones that a model can have.

    Args:
        fields: plain data, as JSON gives it.
        where: beginning of the error message, such as "the configuration of the model gpt2".
        remedy: end of the error message.

    Raises:
        ModelError: a size is too large, or not a whole number of 1 or more.
    """
    for place, number in _integers(fields):
        limit = _limit(place.rpartition(".")[2])
        if abs(number) > limit:
            raise ModelError(
                f"{where} has {place[:100]!r} larger than {limit:,}, which no model has; {remedy}"
            )
    for part in (fields, fields.get("text_config")):
        if isinstance(part, Mapping):
            _check_positive(part, where, remedy)


def _limit(name: str) -> int:
    if any(part in name for part in _NO_COUNTS):
        return _MAX_INTEGER
    return min((n for part, n in _MAX_COUNTS.items() if part in name), default=_MAX_INTEGER)


def _check_positive(fields: Mapping[str, Any], where: str, remedy: str) -> None:
    for name in _POSITIVE:
        value = fields.get(name)
        # Some families have a list, one number a layer.
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and not _is_size(number):
                raise ModelError(
                    f"{where} has {name} {str(number)[:100]!r} where a whole number of 1 or more is expected; {remedy}"
                )
    width, heads = (
        _first(fields, *names) for names in (("hidden_size", "n_embd"), ("num_attention_heads", "n_head"))
    )
    if width and heads and fields.get("head_dim") is None and heads > width:
        raise ModelError(f"{where} has {heads} heads in a width of {width}, which no model has; {remedy}")


def _is_size(value: Any) -> bool:
    """Whether a value is a whole number of 1 or more; some configurations have 1200.0."""
    is_whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return is_whole and value >= 1


def _first(fields: Mapping[str, Any], *names: str) -> int | None:
    values = (fields.get(name) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _integers(value: Any) -> Iterator[tuple[str, int]]:
    """All integers in plain data, each with its path."""
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        place, value = todo.pop()
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            yield place, value
        elif isinstance(value, Mapping):
            todo += [(f"{place}.{name}".lstrip("."), item) for name, item in value.items()]
        elif isinstance(value, list | tuple):
            todo += [(place, item) for item in value]
