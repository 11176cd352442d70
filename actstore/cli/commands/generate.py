"""``actstore generate``: samples continuations of prompts, and captures their activations if that is wanted."""

from typing import Any, Final

import click

from actstore.cli.options.model_options import given_fields, options_of
from actstore.cli.showing.json_document import print_json
from actstore.generating.job import GenerationJob

_METAVARS: Final = {
    "prompts": "SRC",
    "chat_template": "FILE",
    "tools": "FILE",
    "chat_template_arguments": "JSON",
    "out": "FILE",
}


@click.command("generate")
@options_of(GenerationJob, _METAVARS)
@click.option(
    "--capture", metavar="URL", help="Then extract the activations of --hooks over the tokens to a store."
)
@click.option("--hooks", metavar="GLOB[,GLOB]", multiple=True, help="Hooks for --capture. Can be repeated.")
@click.option(
    "--positions",
    metavar="WHICH",
    help="Positions for --capture to store, such as last or role:assistant. Default: all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def generate_command(
    job_file: str | None,
    capture: str | None,
    hooks: tuple[str, ...],
    positions: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Sample continuations of prompts, and write them with their tokens to a file.

    Give a JOB.yaml, or the same fields as options; options take precedence. Run the same command again after
    any interruption: it does only what is missing.

    \b
    actstore generate --model Qwen/Qwen3-0.6B --prompts chats.jsonl --n 4 --out answers.jsonl \\
        --capture runs/answers --hooks blocks.14.hook_resid_post --positions role:assistant
    """
    from actstore.cli.showing.generate_progress import GenerateProgress
    from actstore.generating.job import job_of
    from actstore.generating.run import generate

    if (capture is None) != (not hooks):
        raise click.UsageError("--capture and --hooks go together: where to store activations, and which.")
    if positions is not None and capture is None:
        raise click.UsageError("--positions is for --capture: it says which activations are stored.")
    job = job_of(job_file, given_fields(GenerationJob, options))
    with GenerateProgress(quiet=quiet) as progress:
        report = generate(job, on_event=progress.on_event)
    found: dict[str, Any] = report.to_dict()
    text = str(report)
    if capture is not None:
        captured = _capture(
            job, capture, ",".join(hooks), positions or "all", longest=report.longest, quiet=quiet
        )
        found["capture"] = captured.to_dict()
        text += f"\n\n{captured}"
    if as_json:
        print_json(found)
    else:
        click.echo(text)


def _capture(job: GenerationJob, url: str, hooks: str, positions: str, *, longest: int, quiet: bool) -> Any:
    """Extract the activations over the generated tokens, as they were."""
    from actstore.cli.showing.progress import Progress
    from actstore.extraction.extract import extract
    from actstore.generating.capture import plan_capture

    with Progress(quiet=quiet) as progress:
        run = plan_capture(
            job, longest=longest, hooks=hooks, out=url, positions=positions, on_event=progress.on_event
        )
        pending = sum(run.plan.segment(index).n_sequences for index in run.pending)
        progress.start(pending)
        return extract(run, on_event=progress.on_event)
