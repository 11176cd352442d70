"""``actstore patch``: turns options or a job file into a folder of results."""

from typing import Any, Final

import click

from actstore.cli.options.model_options import given_fields, options_of
from actstore.cli.showing.json_document import print_json
from actstore.patching.jobs.job import PatchJob

_METAVARS: Final = {"pairs": "SRC", "axes": "AXIS[,AXIS]", "positions": "N[,N]", "out": "URL"}


@click.command("patch")
@options_of(PatchJob, _METAVARS)
@click.option(
    "--dry-run", is_flag=True, help="Say how much there is to do and how long it takes; store nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report, and progress, as JSON.")
@click.option("--quiet", is_flag=True, help="No plan and no progress.")
def patch_command(job_file: str | None, dry_run: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Patch a grid for each of many pairs of prompts, and store the metric of every cell.

    Give a JOB.yaml, or the same fields as options; options take precedence. Run the same command again after
    any interruption: it does only what is missing.

    \b
    actstore patch --model gpt2 --pairs pairs.jsonl --hook z --axes layer,head --out s3://bucket/heads
    """
    from actstore.cli.showing.patch_progress import PatchProgress
    from actstore.patching.jobs.duration import estimate_job
    from actstore.patching.jobs.planning import plan_job
    from actstore.patching.jobs.run import run_job

    planned = plan_job(job_file, **given_fields(PatchJob, options))
    if dry_run:
        estimated = estimate_job(planned)
        if as_json:
            print_json(planned.to_dict() | {"estimate": vars(estimated)})
        else:
            click.echo(f"{planned}\ntime     {estimated}")
        return
    if not quiet and not as_json:
        click.echo(f"{planned}\n", err=True)
    with PatchProgress(planned.n_pairs_pending, quiet=quiet, as_json=as_json) as progress:
        report = run_job(planned, on_event=progress.on_event)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(str(report))
