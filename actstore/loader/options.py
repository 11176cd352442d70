"""The checked options of a loader."""

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Unpack

from actstore.errors import LoaderError
from actstore.hooks.naming.names import HookName, each_name
from actstore.loader.arguments import OPTIONS, SHUFFLES, LoaderArguments, Shuffle
from actstore.loader.dropping.drop import Drop, parse

if TYPE_CHECKING:
    import torch

    from actstore.store.committed_store import CommittedStore

_DEFAULTS: Final = {name: option.default for name, option in OPTIONS.items() if option.default is not ...}
_MAX_SEED: Final = 1 << 64
_MAX_PREFETCH: Final = 1_000
_INTEGERS: Final = (
    "batch_size",
    "seed",
    "window_rows",
    "epochs",
    "rank",
    "world_size",
    "prefetch",
    "cache_limit",
)
_OPTIONAL: Final = ("epochs", "cache_limit")
_DTYPES: Final = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class LoaderOptions:
    """The options of a loader. `LoaderArguments` says what each of them means."""

    hooks: tuple[str, ...]
    is_single: bool
    """Whether batches are tensors rather than dicts."""
    batch_size: int
    seed: int
    shuffle: Shuffle | None
    window_rows: int
    drop: Drop
    epochs: int | None
    drop_last: bool
    rank: int
    world_size: int
    dtype: "torch.dtype | None"
    provenance: bool
    prefetch: int
    cache_dir: str | None
    cache_limit: int | None
    device: "torch.device | None"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            LoaderError: an option has an impossible value.
        """
        for name in _INTEGERS:
            value = getattr(self, name)
            try:
                # NumPy's integers cannot be written as JSON, which a state must be.
                is_left_out = value is None and name in _OPTIONAL
                object.__setattr__(self, name, None if is_left_out else operator.index(value))
            except TypeError as error:
                raise LoaderError(f"{name} is {value!r}; it must be an integer") from error
        for is_wrong, message in (
            (not self.hooks, "no hook is named; name one or more"),
            (self.batch_size < 1, f"batch_size is {self.batch_size}; it must be 1 or more"),
            (not 0 <= self.seed < _MAX_SEED, f"seed is {self.seed}; it must be from 0 to 2**64 - 1"),
            (
                self.shuffle not in SHUFFLES.values(),
                f"shuffle is {self.shuffle!r}; it can be 'global', 'window' or None",
            ),
            (self.window_rows < 1, f"window_rows is {self.window_rows}; it must be 1 or more"),
            (
                self.epochs is not None and self.epochs < 1,
                f"epochs is {self.epochs}; it must be 1 or more, or None",
            ),
            (self.world_size < 1, f"world_size is {self.world_size}; it must be 1 or more"),
            (
                not 0 <= self.rank < self.world_size,
                f"rank is {self.rank}; with world_size {self.world_size} it must be from 0 to {self.world_size - 1}",
            ),
            (
                self.batch_size < self.world_size,
                f"batch_size is {self.batch_size}, for all {self.world_size} ranks together; give each a row at least",
            ),
            (
                not 0 <= self.prefetch <= _MAX_PREFETCH,
                f"prefetch is {self.prefetch}; it must be from 0 to {_MAX_PREFETCH} batches",
            ),
            (
                self.cache_limit is not None and (self.cache_dir is None or self.cache_limit < 1),
                f"cache_limit is {self.cache_limit} and cache_dir {self.cache_dir!r}; give a folder and 1 byte or more",
            ),
        ):
            if is_wrong:
                raise LoaderError(message)


def options_of(
    store: "CommittedStore", hooks: "HookName | Sequence[HookName]", **arguments: Unpack[LoaderArguments]
) -> LoaderOptions:
    """Options from the arguments of `Store.loader`.

    Raises:
        HookError: a hook is not stored.
        LoaderError: an option has an impossible value.
    """
    chosen, is_single = chosen_hooks(store, hooks)
    given: dict[str, Any] = _DEFAULTS | arguments
    dropped = [given.pop(name) for name in ("drop", "seqpos", "max_norm", "mask")]
    given["dtype"] = torch_dtype(given["dtype"])
    given["device"] = torch_device(given["device"])
    if given["cache_dir"] is not None:
        given["cache_dir"] = os.fspath(given["cache_dir"])
    return LoaderOptions(hooks=chosen, is_single=is_single, drop=parse(store, *dropped), **given)


def chosen_hooks(
    store: "CommittedStore", hooks: "HookName | Sequence[HookName]"
) -> tuple[tuple[str, ...], bool]:
    """The stored hooks that the user's names stand for. Two names of one tensor are one hook.

    Returns:
        The hooks, and whether a single one was named, without a wildcard.

    Raises:
        HookError: one is not stored.
    """
    names = each_name(hooks)
    hooks_by_name = dict.fromkeys(hook for name in names for hook in store.matching(name))
    return tuple(hooks_by_name), names == [hooks] and "*" not in str(hooks)


def torch_device(device: "torch.device | str | None") -> "torch.device | None":
    """A torch device from its name or itself; None for host memory.

    Raises:
        LoaderError: torch knows no device of this name.
    """
    if device is None:
        return None
    import torch

    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LoaderError(f"device is {device!r}; it can be 'cpu', 'cuda', 'cuda:1' and so on") from error
    return None if parsed.type == "cpu" else parsed


def torch_dtype(dtype: "torch.dtype | str | None") -> "torch.dtype | None":
    """A torch dtype from its name or itself.

    Raises:
        LoaderError: activations cannot have this type.
    """
    if dtype is None:
        return None
    name = dtype_name(dtype)
    if name not in _DTYPES:
        raise LoaderError(f"dtype is {dtype!r}; it can be {', '.join(_DTYPES)}")
    import torch

    parsed: torch.dtype = getattr(torch, name)
    return parsed


def dtype_name(dtype: "torch.dtype | str | None") -> str:
    """The name of a dtype in plans and on the wire, such as ``bfloat16`` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
