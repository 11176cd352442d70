"""``actstore evaluate-sae``: how good SAEs are on the rows of a store."""

from pathlib import Path
from typing import Any

import click

from actstore.cli.options.output_options import json_option, out_option, plot_option
from actstore.cli.options.scan_options import hook_option, scan_arguments, scan_options
from actstore.cli.showing.analysis_progress import AnalysisProgress
from actstore.cli.showing.json_document import print_json
from actstore.opening import open_store


@click.command("evaluate-sae")
@hook_option
@click.option(
    "--sae",
    "saes",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="An SAE that SAELens or actstore train-sae wrote, or a folder with such folders, such as the checkpoints of a "
    "training. Can be repeated.",
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the documents that is measured on. Default: all rows.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of what is drawn.")
@click.option(
    "--dense-above",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Density above which a feature is called dense.",
)
@click.option("--model", help="The model of the store, for the loss with each SAE in the place of the value.")
@click.option(
    "--n-sequences",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Sequences that the model reads, drawn with the seed.",
)
@scan_options
@out_option("one row an SAE")
@plot_option("the figures")
@json_option
def evaluate_sae_command(
    url: str,
    hook: str,
    saes: tuple[Path, ...],
    held_out: float | None,
    seed: int,
    dense_above: float,
    model: str | None,
    n_sequences: int,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
    **of_scan: Any,
) -> None:
    """Measure SAEs on the rows of the store at URL: explained variance, L0, dead features and more.

    All SAEs are measured in one pass. With --model, the loss with each SAE in the place of the value, too.

    \b
    actstore evaluate-sae s3://bucket/run --hook blocks.7.hook_resid_post --sae sae/checkpoints --sae sae
    """
    from actstore.analysis.sae_evaluation.evaluate import evaluate_sae

    with AnalysisProgress(quiet=of_scan["quiet"]) as progress:
        evaluation = evaluate_sae(
            open_store(url),
            hook,
            # Several are told apart by their paths.
            saes[0] if len(saes) == 1 else {str(path): path for path in saes},
            held_out=held_out,
            seed=seed,
            dense_above=dense_above,
            model=model,
            n_sequences=n_sequences,
            on_loss_progress=progress.on_losses,
            **scan_arguments(of_scan, progress.on_progress),
        )
    if out is not None:
        evaluation.to_parquet(out)
    if plot is not None:
        evaluation.plot(plot)
    if as_json:
        print_json(evaluation.to_dict())
    else:
        click.echo(repr(evaluation))
