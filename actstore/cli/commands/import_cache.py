"""``actstore import``: make a store from activations that another library cached."""

from pathlib import Path
from typing import Any

import click

from actstore.cli.showing.byte_progress import ByteProgress
from actstore.counted import counted


@click.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "source",
    type=click.Choice(["saelens"]),
    default="saelens",
    show_default=True,
    help="saelens: a cached_activations_path of its configurations.",
)
@click.option(
    "-o", "--output", metavar="URL", required=True, help="The store: as --out of `actstore extract`."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Type to store in; all but float32 round.",
)
@click.option("--model", help="Hub name or folder of the model, for the names and axes of hooks.")
def import_cache_command(folder: Path, source: str, output: str, dtype: Any, model: str | None) -> None:
    """Write the activations in FOLDER, which another library cached, to a store.

    Run the same command again after any interruption: it does only what is missing.
    """
    del source  # the only source so far
    from actstore.integrations.saelens.cache_import import import_cache
    from actstore.integrations.saelens.cached_rows import CachedRows
    from actstore.store.format.dtypes import dtype as dtype_of

    n_sequences, length, d_in = CachedRows.open(folder).shape
    progress = ByteProgress("imported", n_sequences * length * d_in * dtype_of(dtype).itemsize)
    store = import_cache(folder, output, dtype=dtype, model=model, on_bytes=progress.add)
    click.echo(
        f"{counted(n_sequences, 'sequence')} of {store.hooks[0]} in {store.url}; context_size={length}, d_in={d_in}"
    )
