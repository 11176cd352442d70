"""``actstore stats``: statistics of hooks, from commit records alone."""

import json
from typing import Any

import click

from actstore.errors import HookError, NotCommittedError
from actstore.store.statistics import Statistics
from actstore.store.store import Store, open_store


@click.command("stats")
@click.argument("url")
@click.argument("hooks", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, mean vectors included.")
def stats_command(url: str, hooks: tuple[str, ...], as_json: bool) -> None:
    """Print statistics of HOOKS in the store at URL, or of all its hooks. No activations are read."""
    store = open_store(url)
    chosen = [name for hook in hooks for name in store.matching(hook)]
    found = {name: store.stats(name) for name in dict.fromkeys(chosen)} if hooks else _all(store)
    if as_json:
        click.echo(json.dumps({name: statistics.to_dict() for name, statistics in found.items()}, indent=2))
    else:
        click.echo(_table(found))


def _all(store: Store) -> dict[str, Statistics]:
    """Of every hook that has statistics.

    Raises:
        NotCommittedError: nothing of any hook is committed.
    """
    found = {}
    absent = None
    for name in store.hooks:
        try:
            found[name] = store.stats(name)
        except HookError:
            continue  # attention patterns and scores
        except NotCommittedError as error:
            absent = error  # a run that was begun and is not done
    if absent is not None and not found:
        raise absent
    return found


def _table(found: dict[str, Statistics]) -> str:
    head = ("hook", "tokens", "mean norm", "rms norm", "median", "99 %", "max norm", "max abs", "not finite")
    lines = [head, *(_line(name, statistics) for name, statistics in found.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _line(name: str, statistics: Statistics) -> tuple[str, ...]:
    figures: tuple[Any, ...] = (
        statistics.mean_norm,
        statistics.mean_squared_norm**0.5,
        statistics.norm_quantile(0.5),
        statistics.norm_quantile(0.99),
        statistics.max_norm,
        statistics.max_abs,
    )
    return (name, f"{statistics.count:,}", *(f"{x:.4g}" for x in figures), f"{statistics.n_not_finite:,}")
