"""What a saved SAE says of its data, so that SAELens can find the model, the hook and the text again."""

from collections.abc import Sequence
from typing import Any

from actstore.loader.loader import Loader
from actstore.store.format.plan import TokensIdentity
from actstore.tokens.hub import PREFIX, HubName


def metadata(loader: Loader, hook: str) -> dict[str, Any]:
    """Fields of ``sae.cfg.metadata``, plain data for JSON. What is not known is left out, which SAELens reads as None.

    Args:
        loader: of the training. The first run of its store is described.
        hook: its name as it is stored, which is TransformerLens' name.
    """
    store, drop = loader.store, loader.options.drop
    model, tokens = store.plan.request.model, store.plan.request.tokens
    found = {
        "model_name": model.name,
        "hook_name": hook,
        "hook_head_index": None,
        "context_size": tokens.context_length,
        "seqpos_slice": _as_slice(drop.positions, tokens.context_length),
        "exclude_special_tokens": list(drop.tokens) or False,
        "model_revision": model.revision,
        "model_fingerprint": model.fingerprint,
        "tokens_sha256": store.plan.tokens_sha256,
        # Of all that SAELens has no words for: which rows, and in which order.
        "actstore_rows": {
            "positions": drop.positions and list(drop.positions),
            "max_norm": drop.max_norm,
            "has_mask": drop.mask is not None,
            **loader.state_dict()["order"],
        },
    }
    if model.is_imported:
        return found
    return found | {
        "model_class_name": "HookedTransformer",
        # As SAELens writes it for this class: values are those of the model as it was saved.
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
        "dataset_path": HubName.parse(tokens.source).name
        if tokens.source.startswith(PREFIX)
        else tokens.source,
        "prepend_bos": tokens.begin_batch_token is not None,
        "sequence_separator_token": _separator(tokens, model.config),
        "disable_concat_sequences": tokens.packing == "document",
    }


def _separator(tokens: TokensIdentity, config: dict[str, Any]) -> int | str | None:
    """By name where it has one, as SAELens' default does."""
    found = tokens.separator_token
    named = (name for name in ("bos", "eos") if found is not None and config.get(f"{name}_token_id") == found)
    return next(named, found)


def _as_slice(positions: Sequence[int] | None, length: int) -> list[int | None]:
    """SAELens knows positions as a slice only; others are left unsaid."""
    if positions is None or len(positions) == length:
        return [None]
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    if tuple(positions) != tuple(range(positions[0], positions[-1] + 1, step)):
        return [None]
    ends: list[int | None] = [positions[0], positions[-1] + 1]
    return ends if step == 1 else [*ends, step]
