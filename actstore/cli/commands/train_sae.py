"""``actstore train-sae``: train an SAE of SAELens on a store."""

import math
from pathlib import Path
from typing import Any

import click

from actstore.cli.main import RESUMABLE
from actstore.cli.options.byte_size import byte_size
from actstore.cli.options.loader_options import loader_option
from actstore.cli.options.ranges import Slice
from actstore.counted import counted
from actstore.loader.arguments import SHUFFLES, ReadArguments
from actstore.opening import open_store


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
@click.option(
    "--k", type=click.IntRange(1), default=64, show_default=True, help="Active latents of topk and batchtopk."
)
@click.option(
    "--sparsity",
    type=float,
    default=1.0,
    show_default=True,
    help="Sparsity coefficient of standard and jumprelu.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    help="Rows to train on (default: each row that is not dropped, once).",
)
@loader_option("batch_size", type=click.IntRange(1), default=4096)
@click.option("--lr", type=float, default=3e-4, show_default=True)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the first weights and of the shuffle."
)
@loader_option("shuffle", type=click.Choice(list(SHUFFLES)))
@loader_option("window_rows", type=click.IntRange(1))
@loader_option("drop", " Can be repeated.", multiple=True)
@loader_option("seqpos", " 1: is all but the first.", type=Slice())
@loader_option("cache_dir", type=click.Path(path_type=Path))
@loader_option("cache_limit", type=byte_size())
@click.option("--device", default="cpu", show_default=True, help="Device of the training.")
@click.option(
    "--checkpoints",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of checkpoints, saved in OUT/checkpoints.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    help="Folder of the checkpoint to continue from, or OUT for the newest one.",
)
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
    window_rows: int,
    drop: tuple[str, ...],
    seqpos: slice | None,
    cache_dir: Path | None,
    cache_limit: int | None,
    device: str,
    checkpoints: int,
    resume: Path | None,
    output: Path,
) -> None:
    """Train a sparse autoencoder on HOOK of the store at URL, for SAELens.

    It is saved to the folder OUT. No language model is loaded, and the norm of activations comes from the store.
    """
    from actstore.errors import LoaderError
    from actstore.integrations.saelens.installed import check_installed
    from actstore.integrations.saelens.provider import data_provider
    from actstore.integrations.saelens.training import train_sae
    from actstore.loader.batches.transfer import check_device
    from actstore.storage.urls import local_path

    check_installed()
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class

    output = local_path(output, "the output")
    where = output / "checkpoints"
    if resume is None and where.is_dir() and any(where.iterdir()):
        raise LoaderError(
            f"{where} holds checkpoints of another training; continue from the newest with --resume {output}, or name "
            "another folder"
        )
    check_device(device)
    store = open_store(url)
    acts = store[store.array_of(hook).name]
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
        "shuffle": SHUFFLES[shuffle],
        "window_rows": window_rows,
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
        checkpoint_path=str(where),
    )
    try:
        train_sae(
            store,
            hook,
            cfg,
            sae=sae,
            resume_from=None if resume is None else _newest(resume),
            output=output,
            **options,
        )
    except Exception:
        raise
    except BaseException as error:
        # The same command would start from the beginning.
        newest = _newest(output)
        kept = "there is no checkpoint yet" if newest == output else f"continue with --resume {newest}"
        click.echo(f"\nstopped; {kept}", err=True)  # below the bar
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else RESUMABLE) from error
    n_rows = -(-samples // batch_size) * batch_size
    click.echo(
        f"SAE of {acts.hook}, {sae.d_in} to {sae.d_sae}, trained on {counted(n_rows, 'row')}, in {output}"
    )


def _newest(folder: Path) -> Path:
    """The given checkpoint itself, or the newest complete one in a folder of checkpoints or an output folder."""
    from actstore.integrations.saelens.checkpoint import POSITION  # written last in a checkpoint

    for where in (folder / "checkpoints", folder):
        checkpoints = [path.parent for path in where.glob(f"*/{POSITION}") if path.parent.name.isdecimal()]
        if checkpoints:
            return max(checkpoints, key=lambda path: int(path.name))
    return folder
