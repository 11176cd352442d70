"""``actstore info``: what a store holds."""

import json
from typing import Any

import click

from actstore.store.store import Store, open_store


@click.command("info")
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, with the whole plan.")
def info_command(url: str, as_json: bool) -> None:
    """Say what the store at URL holds, and how much of it is committed."""
    store = open_store(url)
    click.echo(json.dumps(_fields(store), indent=2) if as_json else _text(store))


def _fields(store: Store) -> dict[str, Any]:
    plan = store.plan
    return {
        "url": store.url,
        "complete": store.is_complete,
        "n_segments": plan.n_segments,
        "n_segments_committed": store.n_committed,
        "n_sequences": plan.n_sequences,
        "n_sequences_committed": int(store.committed_rows().sum()),
        "n_tokens": plan.n_tokens,
        "nbytes": plan.nbytes,
        "shape": list(store.shape),
        "hooks": {
            hook.name: {"shape": list(plan.activations(hook).shape), "dtype": plan.request.dtype}
            for hook in plan.request.hooks
        },
        "plan": store.metadata,
    }


def _text(store: Store) -> str:
    from actstore.extraction.report import table

    plan = store.plan
    request = plan.request
    tokens = request.tokens
    n, length = store.shape
    state = "complete" if store.is_complete else "not complete"
    first = plan.activations(request.hooks[0])
    rows = {
        "store": f"{store.url} ({state}: {store.n_committed} of {plan.n_segments} segments)",
        "model": f"{request.model.name} ({request.model.model_type}, {request.model.n_layers} layers, "
        f"{request.model.fingerprint})",
        "tokens": f"{plan.n_tokens:,} in {n:,} sequences of {length}, from {plan.n_documents:,} documents of "
        f"{tokens.source}",
        "packing": tokens.packing
        + (f", order drawn from seed {tokens.seed}" if tokens.seed is not None else ""),
        "size": f"{plan.nbytes / 1e6:,.1f} MB",
        "arrays": f"{list(first.shape)} {first.dtype}, {first.shard_rows} sequences a shard",
        "hooks": "\n".join(store.hooks),
    }
    return table(rows)
