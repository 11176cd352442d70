"""``actstore evaluate-sae``: how good SAEs are on the rows of a store."""

import json
from pathlib import Path

import click

from actstore.cli.options.loader_options import loader_option
from actstore.cli.options.ranges import Slice
from actstore.opening import open_store


@click.command("evaluate-sae")
@click.argument("url")
@click.option("--hook", required=True, help="Name of the hook.")
@click.option(
    "--sae",
    "saes",
    metavar="PATH",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Folder of an SAE of SAELens, or a folder with such folders, such as the checkpoints of a training. Can be "
    "repeated.",
)
@click.option(
    "--held-out-fraction",
    type=click.FloatRange(0, 1, min_open=True),
    help="Measure on this fraction of the documents (default: on all rows).",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of what is drawn.")
@click.option("--sequences", type=Slice(), help="Sequences (default: all).")
@loader_option("seqpos", " 1: is all but the first.", type=Slice())
@loader_option("drop", " Can be repeated.", multiple=True)
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
@click.option("--resume", metavar="URL", help="Folder that keeps what is done, for the same command again.")
@click.option("--executor", default="inline", show_default=True, help="inline or ray.")
@click.option("--num-workers", type=click.IntRange(1), help="Workers of the executor.")
@click.option("--ray-address", help="Address of a Ray cluster.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Write one row an SAE to this Parquet file."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the figures into this PNG file.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures, and progress, as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def evaluate_sae_command(
    url: str,
    hook: str,
    saes: tuple[Path, ...],
    held_out_fraction: float | None,
    seed: int,
    sequences: slice | None,
    seqpos: slice | None,
    drop: tuple[str, ...],
    dense_above: float,
    model: str | None,
    n_sequences: int,
    resume: str | None,
    executor: str,
    num_workers: int | None,
    ray_address: str | None,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure SAEs on the rows of the store at URL: explained variance, L0, dead features and more.

    All SAEs are measured in one pass. With --model, the loss with each SAE in the place of the value, too.

    \b
    actstore evaluate-sae s3://bucket/run --hook blocks.7.hook_resid_post --sae sae/checkpoints --sae sae
    """
    from actstore.analysis.sae_evaluation.evaluate import evaluate_sae
    from actstore.cli.showing.evaluation_progress import EvaluationProgress
    from actstore.storage.urls import local_path

    for file, suffix in ((out, ".parquet"), (plot, ".png")):
        if file is not None:
            file = local_path(file, "the file")
            if file.suffix != suffix or not file.parent.is_dir():
                raise click.UsageError(f"{file} must end with {suffix}, in a folder that exists")
    with EvaluationProgress(quiet=quiet, as_json=as_json) as progress:
        evaluation = evaluate_sae(
            open_store(url),
            hook,
            # Several are told apart by their paths.
            saes[0] if len(saes) == 1 else {str(path): path for path in saes},
            held_out=held_out_fraction,
            seed=seed,
            dense_above=dense_above,
            model=model,
            n_sequences=n_sequences,
            on_loss_progress=progress.on_losses,
            drop=[int(one) if one.isdecimal() else one for one in drop],
            seqpos=seqpos,
            sequences=sequences,
            resume=resume,
            executor=executor,
            num_workers=num_workers,
            ray_address=ray_address,
            on_progress=progress.on_scan,
        )
    if out is not None:
        evaluation.to_parquet(out)
    if plot is not None:
        evaluation.plot(plot)
    click.echo(json.dumps(evaluation.to_dict(), indent=2) if as_json else repr(evaluation))
