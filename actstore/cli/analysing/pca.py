"""``actstore pca``: principal components of hooks, as a table, a file and a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from actstore.cli.options.byte_size import byte_size
from actstore.cli.options.lists import listed
from actstore.cli.options.output_options import json_option, out_option, plot_option
from actstore.cli.options.scan_options import hooks_option, scan_arguments, scan_options
from actstore.cli.showing.analysis_progress import AnalysisProgress
from actstore.cli.showing.json_document import print_json
from actstore.opening import open_store

if TYPE_CHECKING:
    from actstore.analysis.geometry.principal.pca_result import PCA, PCAs

_SHOWN: Final = 5
"""Components in the table."""


@click.command("pca")
@hooks_option
@click.option(
    "--components", type=click.IntRange(1), default=16, show_default=True, help="Components of each hook."
)
@click.option(
    "--max-nbytes",
    type=byte_size(),
    default="2GiB",
    show_default=True,
    help="The most bytes of the sums of a pass; with less, there are more passes.",
)
@click.option(
    "--color",
    metavar="COLUMN",
    default="position",
    show_default=True,
    help="What colours the rows of the picture: position, or a kept column of the store.",
)
@scan_options
@out_option("components, in Parquet with a line for each,", ".safetensors", ".parquet")
@plot_option("the explained variance, and rows along the first two components,")
@json_option
def pca_command(
    url: str,
    hooks: tuple[str, ...],
    components: int,
    max_nbytes: int,
    color: str,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
    **of_scan: Any,
) -> None:
    """Find the principal components of hooks of the store at URL, and draw rows along them.

    A store that was extracted with --covariance has all that is needed, as long as no rows are left out; otherwise
    its rows are read once.

    \b
    actstore pca s3://bucket/run --hook 'blocks.*.hook_resid_post' --drop bos --out pca.safetensors --plot pca.png
    """
    # These import torch, which takes a second.
    from actstore.analysis.geometry.principal.pca import pca
    from actstore.analysis.geometry.principal.sampled_rows import POSITION

    store = open_store(url)
    if plot is not None and color != POSITION:
        store.kept.columns([color])  # it is missing before the rows are read, too
    with AnalysisProgress(quiet=of_scan["quiet"]) as progress:
        options = scan_arguments(of_scan, progress.on_progress)
        found = pca(store, listed(hooks), components, max_nbytes=max_nbytes, **options)
    if out is not None:
        found.save(out)
    if plot is not None and components == 1:
        found.plot(plot)
    elif plot is not None:
        rows = {name: options.get(name) for name in ("drop", "seqpos", "sequences")}
        found.scatter(store, plot, color=color, **rows)
    if as_json:
        print_json({hook: _document(one) for hook, one in found.items()})
    else:
        click.echo(_table(found))


def _document(one: "PCA") -> dict[str, Any]:
    return {
        "rows": one.count,
        "n_not_finite": one.n_not_finite,
        "size": len(one.mean),
        "is_from_statistics": one.is_from_statistics,
        "total_variance": one.total_variance,
        "explained_variance": one.explained_variance.tolist(),
        "explained_variance_ratio": one.explained_variance_ratio.tolist(),
    }


def _table(found: "PCAs") -> str:
    head = ["hook", "rows", "size", "variance", "in all", *(f"{i}" for i in range(_SHOWN)), "not finite"]
    lines = [head]
    for hook, one in found.items():
        shares = [f"{share:.1%}" for share in one.explained_variance_ratio[:_SHOWN]]
        shares += [""] * (_SHOWN - len(shares))
        whole = f"{one.explained_variance_ratio.sum():.1%}"
        figures = [f"{one.count:,}", f"{len(one.mean):,}", f"{one.total_variance:.4g}", whole]
        lines.append([hook, *figures, *shares, f"{one.n_not_finite:,}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
    )
