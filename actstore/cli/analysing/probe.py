"""``actstore probe``: linear probes of hooks, from labels that the store keeps or a file has."""

import json
from typing import TYPE_CHECKING, Any

import click

from actstore.cli.options.byte_size import byte_size
from actstore.errors import JobError
from actstore.opening import open_store

if TYPE_CHECKING:
    from actstore.analysis.probes.results import Probes

_KINDS = ("logistic", "multinomial", "ridge", "mean_difference")
_LISTS = ("l2", "curve")


@click.command("probe")
@click.argument("url", required=False)
@click.option(
    "--hook",
    multiple=True,
    help="A stored hook, or a glob such as 'blocks.*.hook_resid_post'. Can be repeated.",
)
@click.option("--labels", metavar="COLUMN|FILE", help="A kept column, or a .csv, .parquet or .npy file.")
@click.option("--kind", type=click.Choice(_KINDS), help="What is fitted. Default: logistic.")
@click.option(
    "--l2",
    metavar="N[,N]",
    help="Penalties; the best on the held-out documents is taken. Default: 1e-4 to 10.",
)
@click.option("--held-out", type=float, help="Share of the documents that is held out. Default: 0.2.")
@click.option(
    "--groups", metavar="COLUMN", help="A kept column: what it names stays on one side, instead of documents."
)
@click.option("--seed", type=click.IntRange(0), help="Decides which documents are held out. Default: 0.")
@click.option(
    "--standardise/--no-standardise", default=None, help="Whether rows are standardised. Default: they are."
)
@click.option("--curve", metavar="N[,N]", help="Fractions of the training documents. Default: 0.1,0.25,0.5.")
@click.option("--n-bootstrap", type=click.IntRange(0), help="Resamples of the intervals. Default: 1000.")
@click.option(
    "--memory",
    type=byte_size(),
    help="Memory for rows and sums, such as 4GiB. Default: half of what is free.",
)
@click.option(
    "--drop", multiple=True, help="bos, eos, sep or a token id whose rows are left out. Can be repeated."
)
@click.option("--resume", metavar="URL", help="Folder where finished parts of passes are kept.")
@click.option("--executor", help="inline or ray. Default: inline.")
@click.option("--num-workers", type=click.IntRange(1), help="Workers of Ray.")
@click.option("--ray-address", help="Address of a Ray cluster.")
@click.option("--out", metavar="FILE.parquet", help="Write a line for each hook.")
@click.option("--plot", metavar="FILE.png", help="Draw accuracy, or R2, by layer.")
@click.option("--save", metavar="FOLDER", help="Write each probe as safetensors.")
@click.option(
    "--job",
    "job_file",
    metavar="JOB.yaml",
    help="A file with these options as fields, and store for the URL.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def probe_command(url: str | None, job_file: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Fit a linear probe for each of some hooks of the store at URL, and measure it on held-out documents.

    Options take precedence over the fields of a job file.

    \b
    actstore probe runs/reviews --hook 'blocks.*.hook_resid_post' --labels label --plot layers.png
    """
    from actstore.analysis.probes.fitting import fit_probe
    from actstore.analysis.probes.job import parse_job
    from actstore.analysis.probes.rows.label_files import SUFFIXES, read_labels
    from actstore.cli.showing.probe_progress import ProbeProgress
    from actstore.extraction.planning.job_file import read_fields

    given = {} if job_file is None else read_fields(job_file)
    given |= _given(options) | ({} if url is None else {"store": url})
    for name, flag in (("store", "a URL"), ("hook", "--hook"), ("labels", "--labels")):
        if name not in given:
            raise click.UsageError(f"{flag} is missing; give it, or {name} in a job file (--job)")
    job = parse_job(given, job_file or "options")
    _check_names(job.out, job.plot)
    store = open_store(job.store)
    labels: Any = read_labels(store, job.labels) if job.labels.endswith(SUFFIXES) else job.labels
    hooks: Any = job.hook if isinstance(job.hook, str) else list(job.hook)
    with ProbeProgress(quiet=quiet) as progress:
        probes = fit_probe(
            store,
            hooks,
            labels,
            **job.arguments,
            on_progress=progress.on_progress,
            on_hooks=progress.on_hooks,
        )
    _write(probes, job.out, job.plot, job.save)
    click.echo(json.dumps(probes.to_dict(), indent=2) if as_json else str(probes))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, ())}
    for name in _LISTS:
        if name in given:
            given[name] = _numbers(name, given[name])
    if "drop" in given:
        given["drop"] = [int(name) if name.isdecimal() else name for name in given["drop"]]
    return given


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise click.UsageError(f"--{name} is {text!r}; give numbers, separated by commas") from error


def _check_names(out: str | None, plot: str | None) -> None:
    """Refuse, before any work, files of other kinds.

    Raises:
        JobError: one has another suffix.
    """
    for name, path, suffix in (("out", out, ".parquet"), ("plot", plot, ".png")):
        if path is not None and not path.endswith(suffix):
            raise JobError(f"{name} is {path}; give the name of a {suffix} file")


def _write(probes: "Probes", out: str | None, plot: str | None, save: str | None) -> None:
    if out is not None:
        probes.to_parquet(out)
    if plot is not None:
        probes.plot(plot)
    if save is not None:
        probes.save(save)
