"""``actstore verify``: every byte of a store against every record that vouches for it."""

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from actstore.store.checking.verification import Verification

DAMAGED = 3
"""Exit code: something that is committed is not as it was written."""
INCOMPLETE = 75
"""Exit code: all is well so far, and not everything that was planned is there. The same as of a stopped run."""


@click.command("verify")
@click.argument("url")
@click.option("--deep", is_flag=True, help="Also run the model again on some rows, and compare.")
@click.option("--rows", "n_rows", type=click.IntRange(min=1), default=16, help="Rows a run with --deep.")
@click.option("--model", help="Where the model is on this machine, for --deep (default: where it was).")
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
    n_rows: int,
    model: str | None,
    revision: str | None,
    device: str | None,
    repair: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check the store at URL: presence, sizes, checksums, indexes, tokens, statistics.

    Exit code 0: whole and complete; 3: damaged; 75: nothing is damaged, and the extraction is not complete.
    """
    from actstore.cli.byte_progress import ByteProgress
    from actstore.extraction.verify import verify

    progress = ByteProgress("verified", _nbytes(url))
    found = verify(
        url,
        deep=deep,
        repair=repair,
        n_rows=n_rows,
        model=model,
        revision=revision,
        device=device,
        on_object=ignore if quiet else progress.add,
    )
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else _text(found))
    if not found.is_clean:
        raise click.exceptions.Exit(DAMAGED)
    if not found.is_complete:
        raise click.exceptions.Exit(INCOMPLETE)


def ignore(_nbytes: int) -> None:
    """For no progress."""


def _nbytes(url: str) -> int | None:
    """About how much there is to read; None where the store is too damaged to say."""
    from actstore.errors import ActstoreError
    from actstore.opening import open_store

    try:
        return open_store(url).nbytes
    except ActstoreError:
        return None


def _text(found: "Verification") -> str:
    from actstore.extraction.report import table

    n_damaged = len(found.damage)
    state = "clean" if found.is_clean else f"DAMAGED: {n_damaged} finding" + ("s" if n_damaged != 1 else "")
    if found.n_removed or found.n_rewritten:
        state = f"was {'damaged' if n_damaged else 'clean'}, and repaired: {len(found.findings)} findings"
    rows = {
        "store": f"{found.url} ({state})",
        "segments": f"{found.n_committed:,} of {found.n_segments:,} committed",
        "checked": f"{found.n_objects:,} objects, {found.nbytes / 1e6:,.1f} MB in {found.seconds:.1f} s",
    }
    if found.n_rows_recomputed:
        rows["model"] = f"{found.n_rows_recomputed} rows computed again and compared" + (
            ", with the layers alone that the hooks need, for lack of memory"
            if found.reference == "loaded"
            else ""
        )
    if found.findings:
        rows["findings"] = "\n".join(str(finding) for finding in found.findings)
    lost = [finding for finding in found.damage if not finding.is_repairable]
    repaired = [f"{found.n_rewritten} objects written again"] if found.n_rewritten else []
    if found.n_removed:
        repaired.append(f"{found.n_removed} objects removed; run the extraction again to make them anew")
    if repaired:
        rows["repaired"] = "\n".join(repaired)
    if lost:
        rows["lost"] = f"{lost[0].key} cannot be repaired" + (
            ": bring it back from a copy, or extract to another place"
            if lost[0].key.endswith("/plan.json")
            else ": the finding says what to do"
        )
    elif n_damaged and not repaired:
        rows["next"] = f"actstore verify {found.url} --repair, then the same extraction again"
    elif not n_damaged and not found.is_complete:
        runs = "; ".join(found.incomplete)
        rows["next"] = f"the same extraction again, for what is not complete: {runs}"
    return table(rows)
