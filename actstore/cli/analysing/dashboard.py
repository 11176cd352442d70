"""``actstore dashboard``: turns options or a job file into a folder of pages and tables."""

import json
from typing import Any, Final

import click

from actstore.analysis.dashboards.job import DashboardJob, job_of
from actstore.cli.options.model_options import field_options, given_fields
from actstore.errors import JobError

_METAVARS: Final = {"features": "N:N|N,N", "sae": "FOLDER", "of": "FILE", "out": "URL", "drop": "NAME[,NAME]"}


@click.command("dashboard")
@click.argument("url", required=False)
@field_options(DashboardJob, _METAVARS, without=("store",))
@click.option(
    "--job", "job_file", metavar="JOB.yaml", help="File with these fields; options take precedence."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def dashboard_command(
    url: str | None, job_file: str | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Write pages and tables of what features of HOOK in the store at URL are active on.

    Open index.html of the folder in any browser; nothing is loaded from elsewhere. Run the same command again after
    any interruption: pages that are there are not made again.

    \b
    actstore dashboard runs/a --hook blocks.7.hook_resid_post --sae sae --features 0:1000 --out dashboard
    """
    from actstore.analysis.dashboards.dashboard import dashboard
    from actstore.cli.analysing.feature_files import load_features
    from actstore.cli.showing.dashboard_progress import DashboardProgress
    from actstore.opening import open_store

    given = given_fields(DashboardJob, options) | ({} if url is None else {"store": url})
    job = job_of(job_file, given)
    features, numbers = load_features(job.sae, job.of), job.numbers()
    if features is None and numbers is None:
        raise JobError("no features are given: name an SAE, a file of directions, or the numbers of neurons")
    model = None
    if job.model is not None:
        from actstore.hooks.model import HookedModel

        model = HookedModel.from_pretrained(job.model, device="cpu")
    with DashboardProgress(quiet=quiet) as progress:
        made = dashboard(
            open_store(job.store),
            job.hook,
            numbers if features is None else features,
            None if features is None else numbers,
            out=job.out,
            model=model,
            k=job.k,
            n_intervals=job.intervals,
            n_samples=job.samples,
            before=job.before,
            after=job.after,
            seed=job.seed,
            drop=job.dropped(),
            resume=job.resume,
            executor=job.executor,
            num_workers=job.num_workers,
            ray_address=job.ray_address,
            on_progress=progress.on_progress,
            on_page=progress.on_page,
        )
    click.echo(json.dumps(vars(made) | {"index": made.index}, indent=2) if as_json else str(made))
