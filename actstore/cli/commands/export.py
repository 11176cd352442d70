"""``actstore export``: write a hook of a store in the format of another library."""

import math
from pathlib import Path

import click

from actstore.cli.showing.byte_progress import ByteProgress
from actstore.counted import counted
from actstore.opening import open_store


@click.command("export")
@click.argument("url")
@click.argument("hook")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["saelens"]),
    default="saelens",
    show_default=True,
    help="saelens: for cached_activations_path of its configurations.",
)
def export_command(url: str, hook: str, folder: Path, form: str) -> None:
    """Write HOOK of the store at URL to a new FOLDER, in the form of another library.

    Values are float32, with token ids, in the order of the store.
    """
    del form  # the only form so far
    from actstore.integrations.saelens.cache_export import export_cache

    store = open_store(url)
    acts = store[store.array_of(hook).name]
    d_in = math.prod(acts.shape[2:])
    progress = ByteProgress("wrote", math.prod(store.shape) * (d_in + 1) * 4)
    n = export_cache(store, hook, folder, on_bytes=progress.add)
    click.echo(
        f"{counted(n, 'sequence')} of {acts.hook} in {folder}; hook_name={acts.hook!r}, context_size={store.shape[1]}, "
        f"d_in={d_in}"
    )
