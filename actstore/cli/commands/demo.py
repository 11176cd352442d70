"""``actstore demo``: extraction, reading and a picture with what the package bundles; no network, no GPU."""

from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from actstore.demo import MODEL_PATH, TEXT_PATH
from actstore.facade import Store
from actstore.tokens import load_tokenizer

_MAX_TOKENS = 51_200
_PASSAGE = "Last night of all,\nWhen yond same star"
_TOKENS_SHOWN = 32


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("actstore-demo"),
    show_default=True,
    help="Folder for the store and the picture.",
)
def demo_command(out: Path) -> None:
    """Extract from a bundled model, read the store, and draw a picture."""
    from actstore.cli.showing.progress import Progress
    from actstore.extraction.extract import extract
    from actstore.extraction.planning.planning import plan
    from actstore.opening import open_store

    store_path = out / "store"
    click.echo("A small GPT-2, trained on Shakespeare, reads Shakespeare; its residual stream is stored.\n")
    with Progress() as progress:
        run = plan(
            model=str(MODEL_PATH),
            tokens=str(TEXT_PATH),
            documents="paragraph",
            hooks=["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"],
            context_length=128,
            max_tokens=_MAX_TOKENS,
            out=str(store_path),
        )
        click.echo(f"{run}\n")
        progress.start(run.plan.n_sequences)
        report = extract(run, on_event=progress.on_event)
    click.echo(f"{report}\n")

    store = open_store(str(store_path))
    last = store.hooks[-1]
    click.echo("Reading back, as `actstore.open` gives it:")
    click.echo(f"  store = actstore.open({str(store_path)!r})")
    click.echo(f"  store.tokens[0, :8]              {store.tokens[0, :8].tolist()}")
    values = ", ".join(f"{value:.3f}" for value in store[last].numpy((0, 3))[:4])
    click.echo(f"  store[{last!r}][0, 3, :4]  [{values}]\n")

    picture = out / "residual-norms.png"
    try:
        _draw(store, picture)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        click.echo(
            "No picture: drawing needs the extra 'plot'; pip install 'actstore[plot]' and run this again\n"
        )
    else:
        click.echo(f"Picture: {picture} (norm of the residual stream, by layer and token)\n")
    click.echo(
        "Next:\n"
        f"  actstore info {store_path}\n"
        f"  actstore slice {store_path} {last} --seq 0 --pos 0:8\n"
        "  actstore extract --model HuggingFaceTB/SmolLM2-135M --tokens your-text.jsonl \\\n"
        "      --hooks 'blocks.*.hook_resid_post' --context-length 128 --out runs/smollm2\n"
        "  the README goes on from there: S3, Ray, training an SAE, patching"
    )


def residual_norms(store: Store, sequence: int, positions: slice) -> NDArray[Any]:
    """L2 norms of each hook's vectors in a part of a sequence, divided by the hook's mean norm, [hooks, tokens]."""
    norms = [store[hook].norms[sequence, positions] / store.stats(hook).mean_norm for hook in store.hooks]
    return np.stack(norms)


def _draw(store: Store, path: Path) -> None:
    # A backend that needs no display; pyplot would look for one.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    where = store.locate(_PASSAGE)
    sequence, start = int(where.sequences[0]), int(where.positions[0])
    shown = slice(start, start + _TOKENS_SHOWN)
    tokenizer = load_tokenizer(str(MODEL_PATH))
    words = [tokenizer.decode([token]).replace("\n", r"\n") for token in store.tokens[sequence, shown]]
    norms = residual_norms(store, sequence, shown)

    figure = Figure(figsize=(10, 2.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(norms, aspect="auto", origin="lower", norm=LogNorm(0.5, 2), cmap="RdBu_r")
    axes.set_xticks(
        range(len(words)), words, rotation=60, ha="right", rotation_mode="anchor", parse_math=False
    )
    layers = [f"after layer {layer}" for layer in range(len(store.hooks) - 1)]
    axes.set_yticks(range(len(store.hooks)), ["embeddings", *layers])
    axes.set_title("Norm of the residual stream at each token, relative to the mean of its layer")
    bar = figure.colorbar(image, pad=0.01, ticks=[0.5, 1, 2])
    bar.ax.set_yticklabels(["half", "mean", "double"])
    bar.ax.minorticks_off()
    for frame in (*axes.spines.values(), bar.outline):
        frame.set_visible(False)
    axes.tick_params(length=0)
    figure.savefig(path)
