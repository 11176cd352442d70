"""The options that describe a job, shared by ``extract`` and ``plan``."""

from collections.abc import Callable
from typing import Any

import click

_OPTIONS: list[Callable[[Any], Any]] = [
    click.argument("job_file", metavar="[JOB.yaml]", required=False),
    click.option("--model", help="Hugging Face Hub name, or the folder of a saved model."),
    click.option("--revision", help="Branch, tag or commit on the Hub."),
    click.option(
        "--tokens", metavar="SRC", help="Text or token ids: path, glob, URL, or hf:org/name[:config][:split]."
    ),
    click.option("--column", help="Column of a table (default: input_ids or tokens, else text)."),
    click.option(
        "--documents",
        type=click.Choice(["file", "paragraph", "line"]),
        help="What one document is in a .txt file (default: file).",
    ),
    click.option("--tokenizer", help="Hub name or folder (default: the model's)."),
    click.option(
        "--hooks",
        metavar="GLOB[,GLOB]",
        multiple=True,
        help="Hook name or glob, such as 'blocks.*.hook_resid_post'; can be repeated.",
    ),
    click.option("--context-length", type=int, help="Tokens in a stored sequence."),
    click.option("--out", metavar="URL", help="The store: a path, s3://bucket/prefix, any fsspec URL."),
    click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        help="Type to compute and store in (default: as the model was saved).",
    ),
    click.option(
        "--packing",
        type=click.Choice(["concat", "document"]),
        help="Full rows across documents, as SAELens does (default), or one document a row.",
    ),
    click.option(
        "--begin-batch-token", metavar="TOKEN", help="bos, eos, sep, pad, none or an id: begins each row."
    ),
    click.option("--begin-sequence-token", metavar="TOKEN", help="The same choices: begins each document."),
    click.option(
        "--sequence-separator-token",
        metavar="TOKEN",
        help="The same choices: put between documents in a row.",
    ),
    click.option(
        "--pad-token",
        metavar="TOKEN",
        help="bos, eos, sep, pad or an id: fills rows (default: pad, else eos).",
    ),
    click.option("--max-tokens", type=int, help="Stop after this many tokens."),
    click.option("--batch-size", type=int, help="Sequences in one forward (default: about 4,096 tokens)."),
    click.option("--segment-size", type=int, help="Sequences in a unit of work (default: 64 MiB shards)."),
    click.option("--seed", type=int, help="Store sequences in an order drawn from this seed."),
    click.option(
        "--compression",
        type=click.Choice(["lz4", "zstd"]),
        help="Compression of activations (default: none, so that any row is one read).",
    ),
    click.option("--covariance", is_flag=True, default=None, help="Keep second moments in the statistics."),
    click.option(
        "--append", is_flag=True, default=None, help="Add these tokens to a store that holds other ones."
    ),
    click.option(
        "--strict",
        is_flag=True,
        default=None,
        help="Never mix shards of different attempts in a segment, even if they differ only in the last bits.",
    ),
    click.option("--executor", help="inline (default) or ray."),
    click.option("--num-workers", type=int, help="Workers of the ray executor (default: one a GPU)."),
    click.option("--ray-address", help="Ray cluster to join, such as auto (default: start one here)."),
    click.option("--device", help="Device of a worker, such as cuda:0 (default: a GPU if there is one)."),
]


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a job to a click command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def job_fields(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job that were given on the command line."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "hooks" in given:
        given["hooks"] = ",".join(given["hooks"])
    return {
        name: int(value) if name.endswith("_token") and str(value).isdecimal() else value
        for name, value in given.items()
    }
