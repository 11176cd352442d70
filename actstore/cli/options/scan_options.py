"""Options of commands that scan a store: which rows, where it is computed, and how to go on."""

from collections.abc import Callable
from typing import Any

import click

from actstore.analysis.scanning.scan import OnProgress, ScanOptions
from actstore.cli.options.job_defaults import job_defaults
from actstore.cli.options.ranges import Places

_OPTIONS = (
    click.option(
        "--drop",
        multiple=True,
        metavar="NAME|ID[,...]",
        help="Leave out rows of these tokens: bos, eos, sep, or token ids; of chats also template, system, user, "
        "assistant and tool. Can be repeated.",
    ),
    click.option("--seqpos", type=Places(), help="Positions to take. Default: all."),
    click.option("--sequences", type=Places(), help="Sequences to take. Default: all."),
    click.option(
        "--resume",
        metavar="FOLDER",
        help="Folder or URL where finished parts are kept; the same command goes on from them.",
    ),
    click.option("--executor", default="inline", show_default=True, help="inline (this process) or ray."),
    click.option("--num-workers", type=click.IntRange(1), help="Workers of the ray executor."),
    click.option("--ray-address", metavar="ADDRESS", help="Ray cluster to join, such as auto."),
    click.option("--quiet", is_flag=True, help="No progress."),
    job_defaults,
)


def scan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a scan to a click command, which takes them as ``**of_scan``, see `scan_arguments`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def scan_arguments(of_scan: dict[str, Any], on_progress: OnProgress | None = None) -> ScanOptions:
    """The arguments of an analysis, from what the options of `scan_options` were given.

    Args:
        of_scan: the values of the options.
        on_progress: as for `actstore.analysis.scan`.
    """
    names = [name.strip() for part in of_scan["drop"] for name in str(part).split(",")]
    return ScanOptions(
        drop=[int(name) if name.lstrip("-").isdecimal() else name for name in names if name],
        seqpos=of_scan["seqpos"],
        sequences=of_scan["sequences"],
        resume=of_scan["resume"],
        executor=of_scan["executor"],
        num_workers=of_scan["num_workers"],
        ray_address=of_scan["ray_address"],
        on_progress=on_progress,
    )
