"""``actstore train-sae``: an SAE of SAELens from a store."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from actstore.cli.slice import Slice
from actstore.store.store import open_store

if TYPE_CHECKING:
    from actstore.loader.arguments import ReadArguments
    from actstore.loader.options import Shuffle

_SHUFFLES: Final["dict[str, Shuffle | None]"] = {"global": "global", "window": "window", "none": None}


@click.command("train-sae")
@click.argument("url")
@click.argument("hook")
@click.option(
    "--architecture",
    type=click.Choice(["standard", "topk", "batchtopk", "jumprelu"]),
    default="topk",
    show_default=True,
)
@click.option("--d-sae", type=click.IntRange(1), help="Latents (default: 8 times the width of the hook).")
@click.option("--k", type=click.IntRange(1), default=64, show_default=True, help="Of topk and batchtopk.")
@click.option(
    "--sparsity", type=float, default=1.0, show_default=True, help="Coefficient of standard and jumprelu."
)
@click.option("--samples", type=click.IntRange(1), help="To train on (default: every row that is left once).")
@click.option("--batch-size", type=click.IntRange(1), default=4096, show_default=True)
@click.option("--lr", type=float, default=3e-4, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first weights and the shuffle.")
@click.option(
    "--shuffle",
    type=click.Choice(list(_SHUFFLES)),
    default="global",
    show_default=True,
    help="window: for object stores.",
)
@click.option("--drop", multiple=True, help="bos, eos, sep or a token id, to leave out; can be repeated.")
@click.option("--seqpos", type=Slice(), help="Positions to keep, such as 1: for all but the first.")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path), help="Local folder for shards of a remote store."
)
@click.option("--cache-limit", type=click.IntRange(1), help="Bytes that it may take.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--checkpoints",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="How many, into OUT/checkpoints.",
)
@click.option("--resume", type=click.Path(path_type=Path), help="Folder of a checkpoint to go on from.")
@click.option("-o", "--output", metavar="OUT", type=click.Path(path_type=Path), required=True)
def train_sae_command(
    url: str,
    hook: str,
    architecture: str,
    d_sae: int | None,
    k: int,
    sparsity: float,
    samples: int | None,
    batch_size: int,
    lr: float,
    seed: int,
    shuffle: str,
    drop: tuple[str, ...],
    seqpos: slice | None,
    cache_dir: Path | None,
    cache_limit: int | None,
    device: str,
    checkpoints: int,
    resume: Path | None,
    output: Path,
) -> None:
    """Train a sparse autoencoder on HOOK of the store at URL, and save it to a folder for SAELens.

    No language model is loaded, and the norm of activations comes from the store.
    """
    from actstore.integrations.saelens.installed import check_installed
    from actstore.integrations.saelens.provider import data_provider
    from actstore.integrations.saelens.training import train_sae

    check_installed()
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class

    store = open_store(url)
    acts = store[hook]
    d_in = math.prod(acts.shape[2:])
    own: dict[str, dict[str, Any]] = {
        "standard": {"l1_coefficient": sparsity},
        "jumprelu": {"l0_coefficient": sparsity},
        "topk": {"k": k},
        "batchtopk": {"k": k},
    }
    sae = get_sae_training_class(architecture)[1](
        d_in=d_in,
        d_sae=d_sae or 8 * d_in,
        device=device,
        normalize_activations="expected_average_only_in",
        **own[architecture],
    )
    options: ReadArguments = {
        "seed": seed,
        "shuffle": _SHUFFLES[shuffle],
        "drop": [int(one) if one.isdecimal() else one for one in drop],
        "seqpos": seqpos,
        "cache_dir": cache_dir,
        "cache_limit": cache_limit,
    }
    if samples is None:
        with data_provider(store, hook, batch_size=batch_size, **options) as provider:
            samples = provider.loader.n_rows // batch_size * batch_size
    cfg = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=batch_size,
        lr=lr,
        device=device,
        n_checkpoints=checkpoints,
        checkpoint_path=str(output / "checkpoints"),
    )
    train_sae(
        store,
        hook,
        cfg,
        sae=sae,
        resume_from=resume,
        output=output,
        **options,
    )
    click.echo(f"SAE of {acts.hook}, {sae.d_in} to {sae.d_sae}, trained on {samples:,} rows, in {output}")
