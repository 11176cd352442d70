"""Several stores over the same tokens, under one permutation: for transcoders, crosscoders and model diffing."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.hooks.naming.names import HookName
from actstore.loader.arguments import LoaderArguments
from actstore.loader.loader import Loader
from actstore.loader.options import chosen_hooks
from actstore.loader.pair import PairedLoader, check_order, check_tokens
from actstore.opening import open_store

if TYPE_CHECKING:
    Hooks = HookName | Sequence[HookName]


def paired(
    stores_and_hooks: "Sequence[tuple[Store | str, Hooks]]", **options: Unpack[LoaderArguments]
) -> PairedLoader:
    """A loader over several stores whose batches hold the same rows of each: row i is the same token everywhere.

    Two hooks of one store need no pair: give both to `Store.loader`.

    Args:
        stores_and_hooks: two or more pairs of a store, or its path or URL, and the hooks to load, as for
            `Store.loader`.
        options: as for `Store.loader`, the same for all. Names in ``drop`` are tokens of the first store's model.

    Raises:
        HookError: a hook is not stored.
        LoaderError: the stores have different tokens, their rows cannot be in one order, or an option has an impossible
            value.
        NotCommittedError: a row is not committed.
        StorageError: something cannot be read.
    """
    if len(stores_and_hooks) < 2:
        raise LoaderError(
            f"a pair needs two stores or more, and {len(stores_and_hooks)} were given; name all of them"
        )
    if options.get("max_norm") is not None:
        raise LoaderError(
            "max_norm would drop other rows in each store; find the rows to keep in one of them, and give them as mask"
        )
    stores = [open_store(store) if isinstance(store, str) else store for store, _ in stores_and_hooks]
    for store in stores[1:]:
        check_tokens(stores[0], store)
    first = stores[0].loader(stores_and_hooks[0][1], **options)
    if first.options.drop.is_nonfinite_dropped:
        raise LoaderError(
            "drop='nonfinite' would drop other rows in each store; find the rows to keep, and give them as mask"
        )
    loaders = [first]
    for store, (_, hooks) in zip(stores[1:], stores_and_hooks[1:], strict=True):
        chosen, is_single = chosen_hooks(store, hooks)
        own = dataclasses.replace(first.options, hooks=chosen, is_single=is_single)
        loaders.append(Loader(store, own))
        check_order(first, loaders[-1])
    return PairedLoader(loaders)
