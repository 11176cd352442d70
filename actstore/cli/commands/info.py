"""``actstore info``: print what a store holds."""

import json
from typing import Any

import click

from actstore.cli.showing.json_document import print_json
from actstore.counted import counted
from actstore.facade import Store
from actstore.opening import open_store
from actstore.store.format.plan import ChatIdentity
from actstore.store.records.run import Run, runs_with_tokens


@click.command("info")
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, with the whole plan.")
def info_command(url: str, as_json: bool) -> None:
    """Say what the store at URL holds, and how much of it is committed."""
    store = open_store(url)
    if as_json:
        print_json(_fields(store))
    else:
        click.echo(_text(store))


def _fields(store: Store) -> dict[str, Any]:
    return {
        "url": store.url,
        "complete": store.is_complete,
        "n_segments": store.n_segments,
        "n_segments_committed": store.n_committed,
        "n_sequences": store.shape[0],
        "context_length": store.plan.context_length,
        "positions": store.plan.request.tokens.positions or "all",
        "n_sequences_committed": store.n_sequences_committed,
        "n_tokens": store.n_tokens,
        "nbytes": store.nbytes,
        "shape": list(store.shape),
        "hooks": {
            name: {"shape": list(store[name].shape), "dtype": store.plan.request.dtype}
            for name in store.hooks
        },
        "columns": list(store.columns),
        "plan": store.metadata,
        "runs": [
            {
                "run": run.plan.run,
                "tokens_of": run.plan.tokens_of,
                "hooks": list(run.plan.hook_names),
                "n_sequences": run.plan.n_sequences,
                "n_truncated": run.plan.n_truncated,
                "n_tokens_cut": run.plan.n_tokens_cut,
                "n_segments": run.plan.n_segments,
                "n_segments_committed": len(run.committed),
                "compression": run.plan.request.compression,
                "columns": list(run.plan.request.tokens.keep),
                "finished": run.finished is not None,
            }
            for run in store.runs
        ],
    }


def _text(store: Store) -> str:
    from actstore.extraction.report import cut, table

    plan = store.plan
    request = plan.request
    tokens = request.tokens
    n = store.shape[0]
    state = "complete" if store.is_complete else "not complete"
    first = plan.activations(request.hooks[0])
    shapes = {name: list(store[name].shape) for name in store.hooks}
    is_one_shape = len({tuple(shape) for shape in shapes.values()}) == 1
    width = max(len(name) for name in shapes)
    parts = [run.plan for run in store.runs if run.plan.has_own_tokens]
    n_truncated, n_tokens_cut = (
        sum(part.n_truncated for part in parts),
        sum(part.n_tokens_cut for part in parts),
    )
    compressed = f", {request.compression}" if request.compression else ""
    rows = {
        "store": f"{store.url} ({state}: {store.n_committed} of {counted(store.n_segments, 'segment')})",
        "model": f"{request.model.name} ({request.model.model_type}, {request.model.n_layers} layers, "
        f"{request.model.fingerprint})",
        "tokens": f"{store.n_tokens:,} in {counted(n, 'sequence')} of {plan.context_length}, from "
        f"{counted(plan.n_documents, 'document')} of {tokens.source}",
        "packing": tokens.packing
        + (f", order drawn from seed {tokens.seed}" if tokens.seed is not None else "")
        + (f", {cut(n_truncated, n_tokens_cut)} cut at the {tokens.truncate}" if n_truncated else ""),
        **({} if tokens.chat is None else {"chats": _chats(tokens.chat)}),
        **({"chats": "token ids with roles and turns"} if tokens.token_roles else {}),
        "size": f"{'at most ' if compressed else ''}{store.nbytes / 1e6:,.1f} MB",
        "arrays": (f"{[n, *first.shape[1:]]} " if is_one_shape else "")
        + f"{first.dtype}, {counted(first.shard_rows, 'sequence')} a shard{compressed}",
        "hooks": "\n".join(
            name if is_one_shape else f"{name:<{width}}  {shape}" for name, shape in shapes.items()
        ),
    }
    if tokens.positions is not None:
        n_rows = sum(part.plan.n_stored_rows for part in runs_with_tokens(store.runs))
        rows["positions"] = (
            f"{tokens.positions}: {counted(n_rows, 'row')} of each hook, in {counted(plan.width, 'slot')} a sequence"
        )
    if store.columns:
        rows["columns"] = f"{', '.join(store.columns)}, kept by document"
    if store.is_complete and store.n_sequences_committed < n:
        rows["holes"] = (
            f"every hook of only {store.n_sequences_committed:,} of {counted(n, 'sequence')}; see the runs"
        )
    if len(store.runs) > 1:
        rows["runs"] = "\n".join(_line(run) for run in store.runs)
    return table(rows)


def _chats(chat: ChatIdentity) -> str:
    """How chats became text, in one line."""
    given = [
        f"template {chat.template_sha256[:12]}",
        "with a prompt for generation" if chat.add_generation_prompt else "",
        counted(len(chat.tools), "tool") if isinstance(chat.tools, list) else "",
        ", ".join(f"{name} = {json.dumps(value)}" for name, value in chat.arguments.items()),
    ]
    return "messages with roles and turns; " + ", ".join(filter(None, given))


def _line(run: Run) -> str:
    plan = run.plan
    n_hooks = len(plan.hook_names)
    hooks = plan.hook_names[0] if n_hooks == 1 else counted(n_hooks, "hook")
    over = (
        f"of {plan.request.tokens.source}"
        if plan.has_own_tokens
        else f"over the tokens of run {plan.tokens_of}"
    )
    return f"{plan.run}: {hooks} {over}, {len(run.committed)} of {counted(plan.n_segments, 'segment')}"
