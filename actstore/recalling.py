"""Activations of prompts, wherever the store is that has them: in storage, or on a server that computes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.errors import JobError
from actstore.hooks.cache.activation_cache import ActivationCache
from actstore.storage.urls import is_served

if TYPE_CHECKING:
    import torch

    from actstore.hooks.model import HookedModel
    from actstore.hooks.naming.names import HookName


def activations(
    model: "HookedModel | str | Path | None",
    tokens: Any,
    hooks: "HookName | Sequence[HookName]",
    store: str | Path,
    *,
    context_length: int | None = None,
    batch_size: int | None = None,
    dtype: "str | torch.dtype | None" = None,
) -> ActivationCache:
    """The activations of prompts: what the store has of them is read, the rest is computed and added to the store.

    The same call again computes nothing. Prompts are told apart by their token ids, so text and its ids are one prompt,
    and one that is given twice is computed once. Several processes may use one store at once.

    Args:
        model: a `HookedModel`, whose weights are those that it has now; or the name or folder of one, which is loaded
            only if something is to be computed. A store is of one of the two. None for a store of a server.
        tokens: a text; or a list of texts or of token ids, an array or a tensor of ids [n, position], or whatever else
            `actstore.extract` takes from memory. Text begins with the BOS token, as in `HookedModel.to_tokens`.
        hooks: names, globs or pairs such as ``("resid_post", 5)``.
        store: folder or URL of the store, which is made by the first call. Or a store of a server that computes
            (``actstore serve --compute``), ``http://host:port/v1/stores/name``; the model is that of the server then.
        context_length: the longest prompt that a new store has room for. None for the longest of this call, rounded up
            to a multiple of 64, if the model has so many positions.
        batch_size: sequences in a forward, for a new store. None for 8, or 16 if the first call has 64 prompts or more.
        dtype: dtype to compute and to store in, for a model that is named. None for the one it was saved in.

    Returns:
        Values [prompt, position, ...] on the CPU, in the order of the prompts, padded on the right to the longest of
        them; what is at padding means nothing. Methods that need weights work with a `HookedModel` only. Values can
        differ from those of another forward in the last bits, as a batch has another shape.

    Raises:
        HookError, ModelError: there is no such hook or model, or a store cannot hold it.
        JobError: an option is not valid.
        TokensError: there are no prompts, or one is empty or too long.
        StorageError: the store is on a server, and that computes nothing or cannot be reached.
        PlanMismatchError: the store is of another model or dtype, or of chosen positions.
        ActstoreError: the store cannot be read or written, or the computation fails.
    """

    if is_served(str(store)):
        from actstore.query.client.served_store import ServedStore

        given = {"model": model, "context_length": context_length, "batch_size": batch_size, "dtype": dtype}
        for name, value in given.items():
            if value is not None:
                raise JobError(
                    f"{name} was given, and {store} is of a server, which decides that; leave it out"
                )
        return ServedStore(str(store), None, None).activations(tokens, hooks)
    if model is None:
        raise JobError(
            f"model is None, and {store} is no store of a server (http://host:port/v1/stores/name); give the model"
        )
    from actstore.recall.activations import recalled

    return recalled(
        model, tokens, hooks, store, context_length=context_length, batch_size=batch_size, dtype=dtype
    )
