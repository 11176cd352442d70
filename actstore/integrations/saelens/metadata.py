"""Metadata of a saved SAE, by which SAELens can find its model, hook and text again."""

from collections.abc import Sequence
from typing import Any

from actstore.loader.loader import Loader
from actstore.store.format.plan import TokensIdentity
from actstore.tokens.hub import PREFIX, HubName


def metadata(loader: Loader, hook: str) -> dict[str, Any]:
    """The fields of ``sae.cfg.metadata``, plain data for JSON. Unknown fields are left out; SAELens reads them as None.

    Args:
        loader: the loader of the training. The first run of its store is described.
        hook: the stored name of the hook, which is its name in TransformerLens.
    """
    store, drop = loader.store, loader.options.drop
    model, tokens = store.plan.request.model, store.plan.request.tokens
    fields = {
        "model_name": model.name,
        "hook_name": hook,
        "hook_head_index": None,
        "context_size": tokens.context_length,
        "seqpos_slice": _as_slice(drop.positions, tokens.context_length),
        "exclude_special_tokens": list(drop.tokens) or False,
        "model_revision": model.revision,
        "model_fingerprint": model.fingerprint,
        "tokens_sha256": store.plan.tokens_sha256,
        # What SAELens has no fields for: which rows, and in which order.
        "actstore_rows": {
            "positions": drop.positions and list(drop.positions),
            "max_norm": drop.max_norm,
            "has_mask": drop.mask is not None,
            "stored_positions": tokens.positions or "all",
            **loader.state_dict()["order"],
        },
    }
    if model.is_imported:
        return fields
    return fields | {
        "model_class_name": "HookedTransformer",
        # As SAELens does for this class: values are those of the model as it was saved.
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
        "dataset_path": HubName.parse(tokens.source).name
        if tokens.source.startswith(PREFIX)
        else tokens.source,
        "prepend_bos": tokens.begin_batch_token is not None,
        "sequence_separator_token": _separator(tokens, model.config),
        "disable_concat_sequences": tokens.packing == "document",
    }


def _separator(tokens: TokensIdentity, config: dict[str, Any]) -> int | str | None:
    """The separator by its name if it has one, as in SAELens' defaults, otherwise its id."""
    separator = tokens.separator_token
    named = (
        name
        for name in ("bos", "eos")
        if separator is not None and config.get(f"{name}_token_id") == separator
    )
    return next(named, separator)


def _as_slice(positions: Sequence[int] | None, length: int) -> list[int | None]:
    """The positions as SAELens' slice; positions that are no slice are left out."""
    if positions is None or len(positions) == length:
        return [None]
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    if tuple(positions) != tuple(range(positions[0], positions[-1] + 1, step)):
        return [None]
    ends: list[int | None] = [positions[0], positions[-1] + 1]
    return ends if step == 1 else [*ends, step]
