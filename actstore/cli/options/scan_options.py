"""Arguments and options of commands that scan a store: which store, hooks and rows, where it is computed, and how to go
on.
"""

from collections.abc import Callable
from typing import Any, Final

import click

from actstore.analysis.scanning.scan import OnProgress, ScanOptions
from actstore.cli.options.job_defaults import job_defaults
from actstore.cli.options.lists import listed
from actstore.cli.options.ranges import Places

hook_option: Final = click.option(
    "--hook", required=True, help="A stored hook, such as blocks.7.hook_resid_post."
)
hooks_option: Final = click.option(
    "--hook",
    "hooks",
    multiple=True,
    required=True,
    metavar="GLOB[,GLOB]",
    help="Stored hooks, or globs of them, such as 'blocks.*.hook_resid_post'. Can be repeated.",
)

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
    click.option(
        "--executor",
        default="inline",
        show_default=True,
        help="inline (this process), process (one for each GPU of this machine) or ray.",
    ),
    click.option(
        "--num-workers",
        type=click.IntRange(1),
        help="Workers of process and ray. Default: one a GPU, or one if there is none.",
    ),
    click.option(
        "--ray-address",
        metavar="ADDRESS",
        help="Ray cluster to join, such as auto. Default: start one on this machine.",
    ),
    click.option("--quiet", is_flag=True, help="No progress."),
    job_defaults,
)


def scan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the URL of a store and the options of a scan to a click command, which takes ``url`` and, as ``**of_scan``,
    what `scan_arguments` needs.
    """
    for option in (*reversed(_OPTIONS), click.argument("url")):
        command = option(command)
    return command


def scan_arguments(of_scan: dict[str, Any], on_progress: OnProgress | None = None) -> ScanOptions:
    """The arguments of an analysis, from what the options of `scan_options` were given.

    Args:
        of_scan: the values of the options.
        on_progress: as for `actstore.analysis.scan`.
    """
    return ScanOptions(
        drop=[int(name) if name.lstrip("-").isdecimal() else name for name in listed(of_scan["drop"])],
        seqpos=of_scan["seqpos"],
        sequences=of_scan["sequences"],
        resume=of_scan["resume"],
        executor=of_scan["executor"],
        num_workers=of_scan["num_workers"],
        ray_address=of_scan["ray_address"],
        on_progress=on_progress,
    )
