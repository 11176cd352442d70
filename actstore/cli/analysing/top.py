"""``actstore top``: the rows of a store with the largest values of each feature, with their text."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import numpy as np

from actstore.cli.options.feature_options import feature_options, given_features
from actstore.cli.options.output_options import json_option, out_option
from actstore.cli.options.scan_options import hook_option, scan_arguments, scan_options
from actstore.cli.showing.analysis_progress import AnalysisProgress
from actstore.cli.showing.json_document import print_json
from actstore.errors import TokensError
from actstore.opening import open_store

if TYPE_CHECKING:
    from actstore.analysis.top.result import TopActivations

_SHOWN: Final = 20
"""Features that are printed."""


@click.command("top")
@hook_option
@feature_options
@click.option("-k", "k", type=click.IntRange(1), default=20, show_default=True, help="Rows of each feature.")
@click.option(
    "--per",
    type=click.Choice(["row", "sequence"]),
    default="row",
    show_default=True,
    help="sequence takes only the largest row of each sequence.",
)
@click.option("--above", type=float, help="Values must be larger. Default: 0 for an SAE, else any value.")
@click.option(
    "--by-quantile",
    type=click.IntRange(1),
    metavar="N",
    help="Rows drawn at random from each of N quantiles of a feature's values, k of each.",
)
@click.option(
    "--window", type=click.IntRange(0), default=10, show_default=True, help="Tokens shown on each side."
)
@scan_options
@out_option("all rows, with their text,")
@json_option
def top_command(
    url: str,
    hook: str,
    directions: str | None,
    neurons: slice | list[int] | None,
    sae: str | None,
    features: slice | list[int] | None,
    k: int,
    per: Any,
    above: float | None,
    by_quantile: int | None,
    window: int,
    out: Path | None,
    as_json: bool,
    **of_scan: Any,
) -> None:
    """Print the rows with the largest values of each feature in the store at URL, with the text around them.

    The store can be on a server, too. A feature is a direction, a neuron, or a latent of an SAE.

    \b
    actstore top store --hook blocks.3.hook_resid_post --sae sae --features 0,5,9 -k 5
    """
    from actstore.analysis.top.top_activations import top_activations

    store = open_store(url)
    size = int(np.prod(store.array_of(hook).shape))
    given = given_features(directions, neurons, sae, features, size)
    of, numbers = given.only_chosen, given.numbers
    with AnalysisProgress(quiet=of_scan["quiet"]) as progress:
        options = scan_arguments(of_scan, progress.on_progress)
        top = top_activations(store, hook, of, k, per=per, above=above, by_quantile=by_quantile, **options)
    try:
        table = top.to_arrow(before=window, after=window)
    except TokensError as error:
        click.echo(f"without text: {error}", err=True)
        table = top.to_arrow(before=window, after=window, text=False)
    table = table.set_column(0, "feature", [np.asarray(numbers, np.int32)[table["feature"].to_numpy()]])
    if out is not None:
        from actstore.analysis.top.table import write

        write(table, out)
    if as_json:
        print_json(_document(top, table))
        return
    click.echo(_text(top, table, numbers))
    if out is not None:
        click.echo(f"\n{len(table):,} rows of {len(numbers):,} features are in {out}")


def _document(top: "TopActivations", table: Any) -> dict[str, Any]:
    about = {"hook": top.hook, "n_rows": top.n_rows, "n_not_finite": top.n_not_finite}
    return about | {"rows": table.to_pylist()}


def _text(top: "TopActivations", table: Any, numbers: list[int]) -> str:
    """One line a row, under a line for each feature."""
    counted = f", {top.n_not_finite:,} not finite" if top.n_not_finite else ""
    lines = [f"{top.hook}: {len(numbers):,} features of {top.n_rows:,} rows{counted}"]
    rows = table.slice(0, _SHOWN * top.values.shape[1]).to_pylist()
    by_feature: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers[:_SHOWN]}
    for row in rows:
        if row["feature"] in by_feature:
            by_feature[row["feature"]].append(row)
    for number, some in by_feature.items():
        lines += ["", f"feature {number}" + ("" if some else ": no row")]
        lines += [_line(row) for row in some]
    if len(numbers) > _SHOWN:
        lines += [
            "",
            f"and {len(numbers) - _SHOWN:,} more features; choose some with --features, or write --out",
        ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    head = f"{row['value']:10.4g}  {row['sequence']:6d}:{row['position']:<5d}"
    if "context" not in row:
        return f"{head} token {row['token_id']}"
    tokens = [token.replace("\n", "↵") for token in row["context"]]
    # A terminal shows the brackets in bold; elsewhere click leaves the colours out.
    tokens[row["at"]] = click.style(f"[[{tokens[row['at']]}]]", bold=True, fg="yellow")
    return f"{head} {''.join(tokens)}"
