"""``actstore verify``: check every byte of a store against its records."""

from typing import TYPE_CHECKING

import click

from actstore.cli.showing.json_document import print_json
from actstore.counted import counted

if TYPE_CHECKING:
    from actstore.store.verifying.findings import Verification

DAMAGED = 3
"""Exit code if something that is committed is not as it was written."""
INCOMPLETE = 75
"""Exit code if nothing is damaged, but not everything that was planned is there. It is that of a stopped run, too."""


@click.command("verify")
@click.argument("url")
@click.option("--deep", is_flag=True, help="Also run the model again on some sequences, and compare.")
@click.option(
    "--sequences",
    "n_sequences",
    type=click.IntRange(min=1),
    default=16,
    help="Sequences of each run with --deep.",
)
@click.option("--rows", "older_n_sequences", type=click.IntRange(min=1), hidden=True)
@click.option("--model", help="Location of the model on this machine, for --deep (default: where it was).")
@click.option("--revision", help="Branch, tag or commit on the Hub, for --deep.")
@click.option("--device", help="Device for --deep (default: a GPU if there is one).")
@click.option(
    "--repair", is_flag=True, help="Remove what is damaged; the next extract makes exactly that again."
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def verify_command(
    url: str,
    deep: bool,
    n_sequences: int,
    older_n_sequences: int | None,
    model: str | None,
    revision: str | None,
    device: str | None,
    repair: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check every byte of the store at URL, and repair what is damaged with --repair.

    What is checked: presence, sizes, checksums, indexes, tokens, statistics.

    Exit code 0: whole and complete; 3: damaged; 75: nothing is damaged, and the extraction is not complete.
    """
    from actstore.cli.showing.byte_progress import ByteProgress
    from actstore.extraction.verify import verify

    progress = ByteProgress("verified", _nbytes(url))
    result = verify(
        url,
        deep=deep,
        repair=repair,
        # `--rows` is what `--sequences` was called first; scripts may still say so.
        n_rows=n_sequences if older_n_sequences is None else older_n_sequences,
        model=model,
        revision=revision,
        device=device,
        on_object=ignore if quiet else progress.add,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(_text(result))
    if not result.is_clean:
        raise click.exceptions.Exit(DAMAGED)
    if not result.is_complete:
        raise click.exceptions.Exit(INCOMPLETE)


def ignore(_nbytes: int) -> None:
    """Show no progress."""


def _nbytes(url: str) -> int | None:
    """The approximate number of bytes to read; None if the store is too damaged to tell."""
    from actstore.errors import ActstoreError
    from actstore.opening import open_store

    try:
        return open_store(url).nbytes
    except ActstoreError:
        return None


def _text(result: "Verification") -> str:
    from actstore.extraction.report import table

    n_damaged = len(result.damage)
    state = "clean" if result.is_clean else f"DAMAGED: {counted(n_damaged, 'finding')}"
    if result.n_removed or result.n_rewritten:
        state = f"was {'damaged' if n_damaged else 'clean'}, and repaired: {counted(len(result.findings), 'finding')}"
    rows = {
        "store": f"{result.url} ({state})",
        "segments": f"{result.n_committed:,} of {result.n_segments:,} committed",
        "checked": f"{counted(result.n_objects, 'object')}, {result.nbytes / 1e6:,.1f} MB in {result.seconds:.1f} s",
    }
    if result.n_rows_recomputed:
        rows["model"] = f"{counted(result.n_rows_recomputed, 'sequence')} computed again and compared" + (
            ", with the layers alone that the hooks need, for lack of memory"
            if result.reference == "loaded"
            else ""
        )
    if result.findings:
        rows["findings"] = "\n".join(str(finding) for finding in result.findings)
    lost = [finding for finding in result.damage if not finding.is_repairable]
    repaired = [f"{counted(result.n_rewritten, 'object')} written again"] if result.n_rewritten else []
    if result.n_removed:
        repaired.append(
            f"{counted(result.n_removed, 'object')} removed; run the extraction again to make them again"
        )
    if repaired:
        rows["repaired"] = "\n".join(repaired)
    if lost:
        rows["lost"] = f"{lost[0].key} cannot be repaired" + (
            ": bring it back from a copy, or extract to another place"
            if lost[0].key.endswith("/plan.json")
            else ": the finding says what to do"
        )
    elif n_damaged and not repaired:
        rows["next"] = f"actstore verify {result.url} --repair, then the same extraction again"
    elif not n_damaged and not result.is_complete:
        runs = "; ".join(result.incomplete)
        rows["next"] = f"the same extraction again, for what is not complete: {runs}"
    return table(rows)
