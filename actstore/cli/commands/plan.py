"""``actstore plan``: a dry run of an extraction."""

from typing import Any

import click

from actstore.cli.options.job_options import job_fields, job_options
from actstore.cli.showing.json_document import print_json


@click.command("plan")
@job_options
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def plan_command(job_file: str | None, as_json: bool, **options: Any) -> None:
    """Say what an extraction would write, without writing it.

    Takes what `actstore extract` takes. The text is read and tokenised, so that the figures are exact.
    """
    from actstore.cli.showing.progress import Progress
    from actstore.extraction.planning.planning import plan

    with Progress() as progress:
        run = plan(job_file, on_event=progress.on_event, **job_fields(options))
    if as_json:
        print_json(run.to_dict())
    else:
        click.echo(str(run))
