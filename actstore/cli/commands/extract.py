"""``actstore extract``: turns options or a job file into a committed store."""

from typing import Any

import click

from actstore.cli.options.job_options import job_fields, job_options
from actstore.cli.showing.json_document import print_json


@click.command("extract")
@job_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No plan and no progress.")
def extract_command(job_file: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write the activations of a model over a text to a store.

    Give a JOB.yaml, or the same fields as options; options take precedence. Run the same command again after
    any interruption: it does only what is missing.

    \b
    actstore extract --model gpt2 --tokens corpus.jsonl --hooks 'blocks.*.hook_resid_post' \\
        --context-length 128 --out s3://bucket/run
    """
    from actstore.cli.showing.progress import Progress
    from actstore.extraction.extract import extract
    from actstore.extraction.planning.planning import plan

    with Progress(quiet=quiet) as progress:
        run = plan(job_file, on_event=progress.on_event, **job_fields(options))
        if not quiet:
            click.echo(f"{run}\n", err=True)
        pending = sum(run.plan.segment(index).n_sequences for index in run.pending)
        progress.start(pending)
        report = extract(
            run,
            # As arguments, they are refused where the executor has no use for them.
            num_workers=options["num_workers"],
            ray_address=options["ray_address"],
            on_event=progress.on_event,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(str(report))
