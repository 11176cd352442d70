"""``actstore slice``: print or save some activations."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from actstore.cli.options.ranges import Slice
from actstore.errors import JobError, TokensError
from actstore.facade import Store
from actstore.opening import open_store
from actstore.storage.urls import local_path
from actstore.store.reading.activations import Activations


@click.command("slice")
@click.argument("url")
@click.argument("hook")
@click.option("--seq", type=Slice(), default="0:1", show_default=True, help="Sequences.")
@click.option(
    "--pos",
    type=Slice(),
    default=":",
    show_default=True,
    help="Positions of the context, padding included; -1 is the last position of the longest sequences. --last takes "
    "the last token of each.",
)
@click.option("--last", is_flag=True, help="The last token of each sequence whose activations are stored.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "npy", "safetensors"]),
    help="Format. Default: by the suffix of -o, else text. npy has no bfloat16; it is saved as float32, exactly.",
)
@click.option(
    "--text/--no-text",
    "shows_text",
    default=None,
    help="Print the text of each token, too. Default: on a terminal, if the tokenizer is there.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
def slice_command(
    url: str,
    hook: str,
    seq: slice,
    pos: slice,
    last: bool,
    form: str | None,
    shows_text: bool | None,
    output: Path | None,
) -> None:
    """Print activations of HOOK in the store at URL, or save them.

    safetensors files also hold the token ids and positions of the rows. Where only chosen positions are stored, rows
    are those of them that --pos selects; to be saved, they must be as many in all sequences.
    """
    if last and pos != slice(None):
        raise JobError("--last and --pos both say which positions; give one of them")
    output = None if output is None else local_path(output, "the output")
    if output is not None and not output.absolute().parent.is_dir():
        raise JobError(
            f"{output} cannot be written: there is no folder {output.absolute().parent}; make it first"
        )
    form = form or {".npy": "npy", ".safetensors": "safetensors"}.get(output.suffix if output else "", "text")
    store = open_store(url)
    acts = store[store.array_of(hook).name]
    rows = _last_rows(store, seq) if last else _rows(store, seq, pos)
    if not len(rows.sequences):
        n, length = store.tokens.shape
        stored = (
            "" if store.positions is None else f" of which {store.plan.request.tokens.positions} are stored"
        )
        raise JobError(f"the slice is empty; the store has sequences 0:{n} and positions 0:{length}{stored}")
    if form == "text":
        text = _text(acts, rows, _token_texts(store, rows, shows_text, output))
        if output is None:
            click.echo(text)
        else:
            output.write_text(text + "\n", encoding="utf-8")
        return
    rows.check_even()
    data = _npy(acts, rows) if form == "npy" else _safetensors(acts, rows)
    if output is not None:
        output.write_bytes(data)
    elif sys.stdout.isatty():
        raise JobError(f"{form} is not for a terminal; name a file with -o, or pipe it")
    else:
        sys.stdout.buffer.write(data)


@dataclass(frozen=True)
class _Rows:
    """Rows in the order of the store, all of the same sequence together."""

    sequences: NDArray[np.int64]
    """[n_rows]."""
    entries: NDArray[np.int64]
    positions: NDArray[np.int64]
    tokens: NDArray[np.int64]
    counts: NDArray[np.int64]
    """Rows of each of the sequences, [n_sequences]."""

    def check_even(self) -> None:
        """
        Raises:
            JobError: sequences have different numbers of rows, which no array has.
        """
        if (self.counts != self.counts[0]).any():
            raise JobError(
                f"the sequences have {self.counts.min()} to {self.counts.max()} rows each, and an array has equally "
                "many; choose others with --seq and --pos, or --last, or print them"
            )

    def values(self, acts: Activations) -> NDArray[Any]:
        """Their values, [n_rows, *shape of the hook]."""
        values = acts.rows.gather(self.sequences, self.entries)
        if acts.rows.dtype == "bfloat16":
            import ml_dtypes

            return values.view(ml_dtypes.bfloat16)
        return values


def _rows(store: Store, seq: slice, pos: slice) -> _Rows:
    """Rows of a range of sequences and positions."""
    sequences = np.arange(store.shape[0])[seq]
    wanted = np.arange(store.plan.context_length)[pos]
    positions = store.entries.positions(sequences)
    if store.positions is None:
        entries = np.tile(wanted, (len(sequences), 1))
        is_taken = np.ones(entries.shape, bool)
    else:
        is_taken = np.isin(positions, wanted) & (positions >= 0)
        entries = np.tile(np.arange(store.shape[1]), (len(sequences), 1))
    row, column = np.nonzero(is_taken)
    return _of_places(store, sequences, row, entries[row, column], is_taken.sum(axis=1))


def _last_rows(store: Store, seq: slice) -> _Rows:
    """The last row of each sequence of a range that has any."""
    sequences = np.arange(store.shape[0])[seq]
    counts = store.counts[sequences].astype(np.int64)
    (row,) = np.nonzero(counts)
    return _of_places(store, sequences, row, counts[row] - 1, np.minimum(counts, 1)[row])


def _of_places(
    store: Store,
    sequences: NDArray[np.int64],
    row: NDArray[np.int64],
    entries: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> _Rows:
    numbers = sequences[row]
    positions = store.entries.positions_at(numbers, entries)
    tokens = store.tokens.gather(numbers, positions).astype(np.int64)
    return _Rows(numbers, entries, positions, tokens, counts)


def _token_texts(store: Store, rows: _Rows, wanted: bool | None, output: Path | None) -> list[str] | None:
    """The text of the token of each row; None if it is not to be printed, or not known and not asked for.

    Raises:
        TokensError: it is asked for, and the tokenizer is unknown or missing, or is not the same any more.
    """
    if wanted is False or (wanted is None and (output is not None or not sys.stdout.isatty())):
        return None
    from actstore.analysis.top.contexts import TokenTexts

    try:
        texts = TokenTexts(store)
    except TokensError:
        if wanted:
            raise
        return None
    return [repr(texts[token]) for token in rows.tokens.tolist()]


def _text(acts: Activations, rows: _Rows, texts: list[str] | None) -> str:
    """One line per row: its place, its token and its text, the norm of its vector and the first values."""
    values = rows.values(acts)
    n_each = rows.counts.max(initial=0)
    shape = [len(rows.counts), int(n_each), *values.shape[1:]]
    width = 0 if texts is None else 2 + max(len("text"), *map(len, texts))
    head = "" if texts is None else "  text".ljust(width)
    lines = [f"{acts.hook} {shape} {values.dtype}", f"  seq   pos  token{head}        norm  values"]
    for number, (value, sequence, position, token) in enumerate(
        zip(values, rows.sequences, rows.positions, rows.tokens, strict=True)
    ):
        vector = value.astype(np.float32).reshape(-1)
        shown = " ".join(f"{number:9.4f}" for number in vector[:6]) + (" ..." if vector.size > 6 else "")
        text = "" if texts is None else f"  {texts[number]}".ljust(width)
        norm = float(np.linalg.norm(vector.astype(np.float64)))
        lines.append(f"{sequence:5d} {position:5d} {token:6d}{text}  {norm:10.3f}  {shown}")
    return "\n".join(lines)


def _npy(acts: Activations, rows: _Rows) -> bytes:
    values = rows.values(acts)
    buffer = io.BytesIO()
    wide = values.astype(np.float32) if values.dtype.name == "bfloat16" else values
    np.save(buffer, wide.reshape(len(rows.counts), -1, *values.shape[1:]), allow_pickle=False)
    return buffer.getvalue()


def _safetensors(acts: Activations, rows: _Rows) -> bytes:
    import torch
    from safetensors.torch import save

    shape = (len(rows.counts), -1)
    values = torch.from_numpy(acts.rows.gather(rows.sequences, rows.entries)).view(acts.dtype)
    tokens, positions = (
        torch.from_numpy(some).view(*shape) for some in (rows.tokens.astype(np.int32), rows.positions)
    )
    return save({acts.hook: values.view(*shape, *values.shape[1:]), "tokens": tokens, "positions": positions})
