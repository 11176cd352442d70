"""Several stores over the same tokens, under one permutation: for transcoders, crosscoders and model diffing."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from actstore.analysis.alignment import align
from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.hooks.naming.names import HookName
from actstore.loader.arguments import LoaderArguments
from actstore.loader.loader import Loader
from actstore.loader.options import chosen_hooks
from actstore.loader.pair import AlignedLoader, PairedLoader, check_order, check_tokens
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


def aligned(
    first: "tuple[Store | str, Hooks]", other: "tuple[Store | str, Hooks]", **options: Unpack[LoaderArguments]
) -> AlignedLoader:
    """A loader over two stores of one text whose tokenizers differ: row i of both is a token that ends at the same
    character of the same document. For crosscoders and model diffing across families.

    All token ids are decoded when it is made. Tokens without a partner, and those that packing put in, are left out.

    Args:
        first: a store, or its path or URL, and the hooks to load, as for `Store.loader`.
        other: the other one.
        options: as for `Store.loader`, the same for both, without those that drop rows.

    Raises:
        HookError: a hook is not stored.
        LoaderError: the stores are not of one text, or an option has an impossible value.
        NotCommittedError: a row is not committed.
        StorageError: something cannot be read.
        TokensError: a tokenizer is missing, or is not the one that made the tokens.
    """
    if given := [name for name in ("drop", "seqpos", "max_norm", "mask") if options.get(name) is not None]:
        raise LoaderError(
            f"{' and '.join(given)} would drop other rows in each store; leave it out: only aligned tokens are loaded"
        )
    if options.get("shuffle", "global") == "window":
        raise LoaderError(
            "shuffle='window' depends on the shards of each store; choose shuffle='global' or None for aligned rows"
        )
    stores = [open_store(store) if isinstance(store, str) else store for store, _ in (first, other)]
    alignment = align(*stores)
    loaders = []
    for store, (_, hooks), mask in zip(stores, (first, other), alignment.masks, strict=True):
        own: LoaderArguments = {**options, "mask": mask, "drop": ()}
        loaders.append(store.loader(hooks, **own))
    return AlignedLoader(loaders, alignment.n_documents, alignment.n_left_out)
