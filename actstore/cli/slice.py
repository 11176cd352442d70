"""``actstore slice``: print or save some activations."""

import io
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError
from actstore.opening import open_store
from actstore.storage.urls import local_path
from actstore.store.reading.activations import Activations


class Slice(click.ParamType[slice]):
    """A range of sequences or positions in Python's slice notation; a number is a slice of one."""

    name = "A:B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> slice:
        if isinstance(value, slice):
            return value
        try:
            parts = [int(part) if part else None for part in str(value).split(":")]
        except ValueError:
            parts = []
        if len(parts) == 1 and parts[0] is not None:
            return slice(parts[0], parts[0] + 1 or None)
        if len(parts) in (2, 3) and parts[2:] != [0]:
            return slice(*parts)
        return self.fail(f"{value!r} is not a range; write A:B, A: or :B, or one number", param, ctx)


@click.command("slice")
@click.argument("url")
@click.argument("hook")
@click.option("--seq", type=Slice(), default="0:1", show_default=True, help="Sequences.")
@click.option("--pos", type=Slice(), default=":", show_default=True, help="Positions.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "npy", "safetensors"]),
    help="Format. Default: by the suffix of -o, else text. npy has no bfloat16; it is saved as float32, exactly.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
def slice_command(url: str, hook: str, seq: slice, pos: slice, form: str | None, output: Path | None) -> None:
    """Print activations of HOOK in the store at URL, or save them.

    safetensors files also hold the token ids of the rows.
    """
    output = None if output is None else local_path(output, "the output")
    if output is not None and not output.absolute().parent.is_dir():
        raise JobError(
            f"{output} cannot be written: there is no folder {output.absolute().parent}; make it first"
        )
    form = form or {".npy": "npy", ".safetensors": "safetensors"}.get(output.suffix if output else "", "text")
    store = open_store(url)
    acts = store[hook]
    values = acts.numpy((seq, pos))
    if 0 in values.shape:
        n, length = store.shape
        raise JobError(f"the slice is empty; the store has sequences 0:{n} and positions 0:{length}")
    tokens = store.tokens[seq, pos]
    if form == "text":
        text = _text(
            acts.hook, values, tokens, np.arange(store.shape[0])[seq], np.arange(store.shape[1])[pos]
        )
        if output is None:
            click.echo(text)
        else:
            output.write_text(text + "\n", encoding="utf-8")
        return
    data = _npy(values) if form == "npy" else _safetensors(acts, seq, pos, tokens)
    if output is not None:
        output.write_bytes(data)
    elif sys.stdout.isatty():
        raise JobError(f"{form} is not for a terminal; name a file with -o, or pipe it")
    else:
        sys.stdout.buffer.write(data)


def _text(
    hook: str, values: NDArray[Any], tokens: NDArray[Any], sequences: NDArray[Any], positions: NDArray[Any]
) -> str:
    """One line per position: its place, its token, the norm of its vector and the first values."""
    lines = [f"{hook} {list(values.shape)} {values.dtype}", "  seq   pos  token        norm  values"]
    for i, sequence in enumerate(sequences):
        for j, position in enumerate(positions):
            vector = values[i, j].astype(np.float32).reshape(-1)
            shown = " ".join(f"{value:9.4f}" for value in vector[:6]) + (" ..." if vector.size > 6 else "")
            norm = float(np.linalg.norm(vector.astype(np.float64)))
            lines.append(f"{sequence:5d} {position:5d} {tokens[i, j]:6d}  {norm:10.3f}  {shown}")
    return "\n".join(lines)


def _npy(values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    wide = values.astype(np.float32) if values.dtype.name == "bfloat16" else values
    np.save(buffer, wide, allow_pickle=False)
    return buffer.getvalue()


def _safetensors(acts: Activations, seq: slice, pos: slice, tokens: NDArray[Any]) -> bytes:
    import torch
    from safetensors.torch import save

    return save({acts.hook: acts[seq, pos], "tokens": torch.from_numpy(tokens)})
