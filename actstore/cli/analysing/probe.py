"""``actstore probe``: linear probes of hooks, from labels that the store keeps or a file has."""

from pathlib import Path
from typing import Any

import click

from actstore.cli.options.byte_size import byte_size
from actstore.cli.options.lists import Numbers, listed
from actstore.cli.options.output_options import json_option, out_option, plot_option
from actstore.cli.options.scan_options import hooks_option, scan_arguments, scan_options
from actstore.cli.showing.analysis_progress import AnalysisProgress
from actstore.cli.showing.json_document import print_json
from actstore.opening import open_store

_KINDS = ("logistic", "multinomial", "ridge", "mean_difference")


@click.command("probe")
@hooks_option
@click.option(
    "--labels",
    required=True,
    metavar="COLUMN|FILE",
    help="A kept column, or a .csv, .parquet or .npy file.",
)
@click.option(
    "--kind", type=click.Choice(_KINDS), default="logistic", show_default=True, help="What is fitted."
)
@click.option(
    "--l2",
    type=Numbers(),
    help="Penalties; the best on the held-out documents is taken. Default: 1e-4 to 10.",
)
@click.option(
    "--held-out",
    type=float,
    default=0.2,
    show_default=True,
    help="Share of the documents that is held out.",
)
@click.option(
    "--groups", metavar="COLUMN", help="A kept column: what it names stays on one side, instead of documents."
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Decides which documents are held out.",
)
@click.option(
    "--standardise/--no-standardise",
    default=True,
    show_default=True,
    help="Whether rows are standardised.",
)
@click.option("--curve", type=Numbers(), help="Fractions of the training documents. Default: 0.1,0.25,0.5.")
@click.option(
    "--n-bootstrap",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="Resamples of the intervals.",
)
@click.option(
    "--memory",
    type=byte_size(),
    help="Memory for rows and sums, such as 4GiB. Default: half of what is free.",
)
@scan_options
@out_option("a line for each hook")
@plot_option("accuracy, or R2, by layer")
@click.option("--save", metavar="FOLDER", help="Write each probe as safetensors.")
@json_option
def probe_command(
    url: str,
    hooks: tuple[str, ...],
    labels: str,
    kind: Any,
    l2: list[float] | None,
    held_out: float,
    groups: str | None,
    seed: int,
    standardise: bool,
    curve: list[float] | None,
    n_bootstrap: int,
    memory: int | None,
    out: Path | None,
    plot: Path | None,
    save: str | None,
    as_json: bool,
    **of_scan: Any,
) -> None:
    """Fit a linear probe for each of some hooks of the store at URL, and measure it on held-out documents.

    \b
    actstore probe runs/reviews --hook 'blocks.*.hook_resid_post' --labels label --plot layers.png
    """
    from actstore.analysis.probes.fitting import CURVE, PENALTIES, fit_probe
    from actstore.analysis.probes.rows.label_files import SUFFIXES, read_labels

    store = open_store(url)
    with AnalysisProgress(quiet=of_scan["quiet"]) as progress:
        probes = fit_probe(
            store,
            listed(hooks),
            read_labels(store, labels) if labels.endswith(SUFFIXES) else labels,
            kind,
            l2=PENALTIES if l2 is None else l2,
            held_out=held_out,
            groups=groups,
            seed=seed,
            standardise=standardise,
            curve=CURVE if curve is None else curve,
            n_bootstrap=n_bootstrap,
            memory=memory,
            on_hooks=progress.counting("fitting", "fitted", "hooks"),
            **scan_arguments(of_scan, progress.on_progress),
        )
    if out is not None:
        probes.to_parquet(out)
    if plot is not None:
        probes.plot(plot)
    if save is not None:
        probes.save(save)
    if as_json:
        print_json(probes.to_dict())
    else:
        click.echo(str(probes))
