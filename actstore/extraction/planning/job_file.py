"""Reading the fields of a job from a YAML file, with little time and memory whatever is in it."""

from typing import Any, Final

import yaml

from actstore.errors import JobError, StorageError
from actstore.reason import reason

_MAX_NBYTES: Final = 256 << 10
"""Largest job file, which takes seconds to parse. A job that names every hook of a large model is a fifth of it."""
_MAX_VALUES: Final = 20_000
"""Most values in a job file, counting the values of an alias each time that it is used."""


def read_fields(url: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Args:
        url: path or fsspec URL of the file.

    Raises:
        JobError: the file is too large, no YAML, no mapping, or has too many values.
        StorageError: the file cannot be read.
    """
    fields = _parsed(_read(url), url)
    if not isinstance(fields, dict):
        raise JobError(
            f"{url} must hold a mapping of fields, such as 'model: gpt2', not {type(fields).__name__}"
        )
    return {str(key): value for key, value in fields.items()}


def _read(url: str) -> bytes:
    from actstore.storage.opening import open_blobs

    folder, slash, name = url.rpartition("/")
    try:
        blobs = open_blobs(folder or slash or ".")
        info = blobs.head(name)
        if info is not None and info.nbytes > _MAX_NBYTES:
            raise JobError(
                f"{url} has {info.nbytes} bytes, and a job file has at most {_MAX_NBYTES}; give the file of the job "
                "(its text goes into the field tokens)"
            )
        return bytes(blobs.read(name, 0, None if info is None else info.nbytes))
    except StorageError as error:
        raise StorageError(f"the job file cannot be read: {error}") from error


def _parsed(data: bytes, url: str) -> Any:
    loader = None
    try:
        loader = yaml.SafeLoader(data)
        node = loader.get_single_node()
        _check_size(node, url)
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise JobError(
            f"{url} is not valid YAML: {error.problem or error.context or reason(error)}{place}"
            + _hint(error)
        ) from error
    except RecursionError as error:
        raise JobError(
            f"{url} has values nested too deep; a job is a flat mapping of fields, such as 'model: gpt2'"
        ) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # Text that is not UTF-8, a day that no month has, a number of a million digits.
        raise JobError(f"{url} is not valid YAML: {reason(error)}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _hint(error: yaml.MarkedYAMLError) -> str:
    is_alias = error.context is not None and "alias" in error.context
    return "; put names that begin with * in quotes, such as '*.hook_resid_post'" if is_alias else ""


def _check_size(root: "yaml.Node | None", url: str) -> None:
    """Refuse a file with too many values, before any is made: an alias repeats a node, without end inside of itself."""
    todo, n_values = [root], 0
    while todo:
        node = todo.pop()
        n_values += 1
        if n_values > _MAX_VALUES:
            raise JobError(
                f"{url} holds more than {_MAX_VALUES:,} values, counting what its aliases (*name) stand for each time; "
                "write the fields of one job, without aliases inside of each other"
            )
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            _check_unique_names(node, url)
            todo += [part for pair in node.value for part in pair]


def _check_unique_names(node: "yaml.MappingNode", url: str) -> None:
    """Refuse a name that occurs twice in a mapping; YAML would silently keep the last value."""
    names: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in names:
                line = key.start_mark.line + 1
                raise JobError(
                    f"{url} has {reason(key.value)!r} a second time in line {line}; leave one of them"
                )
            names.add(key.value)
