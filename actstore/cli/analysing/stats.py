"""``actstore stats``: statistics of hooks, from commit records alone, and how well a shuffle mixes sequences."""

from typing import TYPE_CHECKING, Any

import click

from actstore.cli.options.loader_options import loader_option
from actstore.cli.showing.json_document import print_json
from actstore.counted import counted
from actstore.errors import HookError, NotCommittedError
from actstore.facade import Store
from actstore.loader.arguments import OPTIONS, SHUFFLES
from actstore.opening import open_store
from actstore.store.statistics.hook_statistics import Statistics

if TYPE_CHECKING:
    from actstore.analysis.shuffle_quality import ShuffleQuality


@click.command("stats")
@click.argument("url")
@click.argument("hooks", nargs=-1)
@click.option(
    "--shuffle",
    type=click.Choice(list(SHUFFLES)),
    help="Print how well batches of one HOOK in this order mix sequences, compared with independent draws.",
)
@loader_option("batch_size", type=click.IntRange(1))
@loader_option("seed", type=click.IntRange(0), default=None, show_default=str(OPTIONS["seed"].default))
@loader_option(
    "window_rows", type=click.IntRange(1), default=None, show_default=str(OPTIONS["window_rows"].default)
)
@click.option("--batches", type=click.IntRange(1), help="Number of batches to look at. Default: 100.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, mean vectors included.")
def stats_command(
    url: str, hooks: tuple[str, ...], shuffle: str | None, as_json: bool, **of_shuffle: int | None
) -> None:
    """Print statistics of HOOKS in the store at URL, or of all its hooks. No activations are read.

    With --shuffle, print what batches of that order of one HOOK are made of.
    """
    given = {name: value for name, value in of_shuffle.items() if value is not None}
    if shuffle is not None:
        if len(hooks) != 1 or "batch_size" not in given:
            raise click.UsageError("--shuffle is about batches of one HOOK; give the hook and --batch-size")
        _print_quality(open_store(url), hooks[0], shuffle, given, as_json)
        return
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{names} is about a shuffle; give --shuffle with it")
    store = open_store(url)
    chosen = [name for hook in hooks for name in store.matching(hook)]
    statistics_by_hook = (
        {name: store.stats(name) for name in dict.fromkeys(chosen)} if hooks else _all_statistics(store)
    )
    where = {
        name: _where(store, name)
        for name, statistics in statistics_by_hook.items()
        if statistics.n_not_finite
    }
    if as_json:
        documents = {
            name: statistics.to_dict() | {"not_finite_in": where.get(name, [])}
            for name, statistics in statistics_by_hook.items()
        }
        print_json(documents)
    else:
        click.echo(
            "\n".join(
                [_table(statistics_by_hook), *(_described(name, places) for name, places in where.items())]
            )
        )


_MOST_PLACES = 1000


def _where(store: Store, hook: str) -> list[tuple[int, int, int]]:
    """(first sequence, last sequence (exclusive), tokens with NaN or infinity) of each segment that has such tokens."""
    segments = store.not_finite(hook, most_segments=_MOST_PLACES)
    return [(rows.start, rows.stop, n_tokens) for rows, n_tokens in segments[:_MOST_PLACES]]


def _described(hook: str, places: list[tuple[int, int, int]]) -> str:
    some = ", ".join(f"{n_tokens:,} of sequences {start}:{stop}" for start, stop, n_tokens in places[:8])
    return f"{hook}: NaN or infinity in tokens {some}" + (", ..." if len(places) > 8 else "")


def _all_statistics(store: Store) -> dict[str, Statistics]:
    """The statistics of every hook that has any.

    Raises:
        NotCommittedError: nothing of any hook is committed.
    """
    statistics_by_hook = {}
    absent = None
    for name in store.hooks:
        try:
            statistics_by_hook[name] = store.stats(name)
        except HookError:
            continue  # attention patterns and scores
        except NotCommittedError as error:
            absent = error  # a run that was begun and is not complete
    if absent is not None and not statistics_by_hook:
        raise absent
    return statistics_by_hook


def _table(statistics_by_hook: dict[str, Statistics]) -> str:
    head = ("hook", "tokens", "mean norm", "rms norm", "median", "99 %", "max norm", "max abs", "not finite")
    lines = [head, *(_line(name, statistics) for name, statistics in statistics_by_hook.items())]
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


def _print_quality(store: Store, hook: str, shuffle: str, given: dict[str, Any], as_json: bool) -> None:
    from actstore.analysis.shuffle_quality import BATCHES, shuffle_quality  # torch, which takes a second

    n_batches = given.pop("batches", BATCHES)
    with store.loader(hook, shuffle=SHUFFLES[shuffle], **given) as loader:
        quality = shuffle_quality(loader, n_batches)
    if as_json:
        print_json(quality.to_dict())
    else:
        click.echo(_quality_text(quality))


def _quality_text(quality: "ShuffleQuality") -> str:
    order, draws = quality.order, quality.independent
    figures = {
        "sequences in a batch": (order.sequences, draws.sequences),
        "rows per sequence": (order.rows_per_sequence, draws.rows_per_sequence),
        "most rows of one sequence": (order.most_rows, draws.most_rows),
        "normalised entropy": (order.entropy, draws.entropy),
    }
    batches = f"{counted(quality.n_batches, 'batch', 'batches')} of {counted(quality.batch_rows, 'row')}"
    rows = f"{counted(quality.n_rows, 'row')} in {counted(quality.n_sequences, 'sequence')}"
    lines = [f"{batches}, of {rows}", "", f"{'':26}{'this order':>14}{'independent':>14}"]
    lines += [f"{name:26}{ours:14,.5g}{theirs:14,.5g}" for name, (ours, theirs) in figures.items()]
    return "\n".join(lines)
