"""``actstore demo``: the whole road with what comes in the package; no network, no GPU."""

from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from actstore.demo import MODEL_PATH, TEXT_PATH
from actstore.store.store import Store

_MAX_TOKENS = 51_200
_SEQUENCES_SHOWN = 64


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("actstore-demo"),
    show_default=True,
    help="Folder for the store and the picture.",
)
def demo_command(out: Path) -> None:
    """Extract from a bundled model, read back, draw one picture."""
    from actstore.cli.progress import Progress
    from actstore.extraction.extract import extract
    from actstore.extraction.planning import plan
    from actstore.store.store import open_store

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
        progress.start(run.plan.n_sequences, run.plan.context_length)
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
    _draw(store, picture)
    click.echo(f"Picture: {picture} (norm of the residual stream, by layer and position)\n")
    click.echo(
        "Next:\n"
        f"  actstore info {store_path}\n"
        f"  actstore slice {store_path} {last} --seq 0 --pos 0:8\n"
        "  actstore extract --model HuggingFaceTB/SmolLM2-135M --tokens your-text.jsonl \\\n"
        "      --hooks 'blocks.*.hook_resid_post' --context-length 128 --out runs/smollm2\n"
        "  the README goes on from there: S3, Ray, training an SAE, patching"
    )


def residual_norms(store: Store, n_sequences: int) -> NDArray[Any]:
    """[hooks, positions] L2 norm of each hook's vectors, averaged over the first sequences."""
    values = [store[hook].numpy(slice(n_sequences)) for hook in store.hooks]
    return np.stack([np.linalg.norm(value.astype(np.float64), axis=-1).mean(axis=0) for value in values])


def _draw(store: Store, path: Path) -> None:
    # The backend that needs no display; pyplot would look for one.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    norms = residual_norms(store, _SEQUENCES_SHOWN)
    figure = Figure(figsize=(9, 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(norms, aspect="auto", origin="lower", norm=LogNorm(), cmap="viridis")
    axes.set_yticks(
        range(len(store.hooks)), [hook.replace("blocks.", "").replace("hook_", "") for hook in store.hooks]
    )
    axes.set_xlabel("position in the sequence")
    axes.set_ylabel("layer")
    axes.set_title(f"Norm of the residual stream, mean of {_SEQUENCES_SHOWN} sequences")
    figure.colorbar(image, label="L2 norm (log scale)")
    figure.savefig(path)
