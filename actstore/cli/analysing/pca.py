"""``actstore pca``: principal components of hooks, as a table, a file and a picture."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from actstore.analysis.geometry.principal.pca_job import EXPECTED, PcaJob
from actstore.cli.options.model_options import given_fields, options_of
from actstore.cli.options.ranges import Slice
from actstore.errors import JobError
from actstore.extraction.planning.job_file import read_fields
from actstore.extraction.planning.parsing import parsed
from actstore.opening import open_store

if TYPE_CHECKING:
    from actstore.analysis.geometry.principal.pca_result import PCA, PCAs

_METAVARS: Final = {
    "hook": "GLOB[,GLOB]",
    "drop": "NAME[,NAME]",
    "seqpos": "A:B",
    "out": "FILE",
    "plot": "FILE.png",
    "color": "COLUMN",
    "resume": "URL",
}
_SHOWN: Final = 5
"""Components in the table."""


@click.command("pca")
@click.argument("url")
@options_of(PcaJob, _METAVARS, is_file_option=True)
@click.option("--json", "as_json", is_flag=True, help="Print the variances as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def pca_command(url: str, job_file: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Find the principal components of hooks of the store at URL, and draw rows along them.

    A store that was extracted with --covariance has all that is needed, as long as no rows are left out; otherwise
    its rows are read once.

    \b
    actstore pca s3://bucket/run --hook 'blocks.*.hook_resid_post' --drop bos --out pca.safetensors --plot pca.png
    """
    given = given_fields(PcaJob, options)
    fields = {} if job_file is None else read_fields(job_file)
    job = parsed(PcaJob, fields | given, job_file or "pca", EXPECTED)
    _check_suffixes(job)
    seqpos = None if job.seqpos is None else Slice().convert(job.seqpos, None, None)
    # These import torch, which takes a second.
    from actstore.analysis.geometry.principal.pca import pca
    from actstore.analysis.geometry.principal.sampled_rows import POSITION
    from actstore.cli.showing.scan_progress import ScanProgress

    store = open_store(url)
    if job.plot is not None and job.color != POSITION:
        store.kept.columns([job.color])  # it is missing before the rows are read, too
    with ScanProgress(quiet=quiet or as_json) as progress:
        found = pca(
            store,
            job.hooks,
            job.components,
            max_nbytes=job.max_nbytes,
            drop=job.dropped,
            seqpos=seqpos,
            resume=job.resume,
            executor=job.executor,
            num_workers=job.num_workers,
            ray_address=job.ray_address,
            on_progress=progress.on_progress,
        )
    if job.out is not None:
        found.save(job.out)
    if job.plot is not None and job.components == 1:
        found.plot(job.plot)
    elif job.plot is not None:
        found.scatter(store, job.plot, color=job.color, drop=job.dropped, seqpos=seqpos)
    if as_json:
        click.echo(json.dumps({hook: _document(one) for hook, one in found.items()}, indent=2))
    else:
        click.echo(_table(found))


def _check_suffixes(job: PcaJob) -> None:
    """See that files can be written before anything is read."""
    for name, path, suffixes in (
        ("out", job.out, (".safetensors", ".parquet")),
        ("plot", job.plot, (".png",)),
    ):
        if path is not None and Path(path).suffix not in suffixes:
            raise JobError(f"{name} is {path}; its name must end with {' or '.join(suffixes)}")


def _document(one: "PCA") -> dict[str, Any]:
    shares = one.explained_variance_ratio.tolist()
    return {
        "rows": one.count,
        "n_not_finite": one.n_not_finite,
        "size": len(one.mean),
        "is_from_statistics": one.is_from_statistics,
        "total_variance": one.total_variance,
        "explained_variance": one.explained_variance.tolist(),
        "explained_variance_ratio": [None if share != share else share for share in shares],
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
