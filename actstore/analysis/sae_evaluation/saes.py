"""SAEs with names, from what a user gives: objects, folders, and folders of checkpoints."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from actstore.analysis import sae_lens_objects
from actstore.analysis.sae_evaluation.autoencoder import EvaluatedSae
from actstore.errors import JobError
from actstore.storage.urls import local_path

_DEEPEST: Final = 3
"""How far below a folder SAEs are looked for: ``OUT/checkpoints/4096/name`` is such a one."""
_SAMPLES: Final = re.compile(r"(?:final_)?(\d+)")
"""Names of SAELens' checkpoints, which say how many rows came before."""


def saes_of(given: Any, shape: Sequence[int]) -> tuple[EvaluatedSae, ...]:
    """The SAEs that a user means, with a name each.

    Args:
        given: an SAE; the folder of one; a folder with folders of SAEs, such as the checkpoints of a training; or a
            list, or a dictionary by name, of these.
        shape: shape of the hook at one position.

    Raises:
        JobError: there is none, one does not fit the hook, or two have one name.
        MissingExtraError: SAELens is needed and not installed.
        StorageError: a path is not one of this machine.
    """
    found: dict[str, EvaluatedSae] = {}
    for name, sae, n_samples in _named(given):
        if name in found:
            raise JobError(f"two SAEs have the name {name}; give a dictionary with a name for each")
        _check_rebuilds(sae, name)
        found[name] = EvaluatedSae.of(name, sae_lens_objects.inference(sae, name), shape, n_samples)
    if not found:
        raise JobError("no SAE was given; an evaluation needs one at least")
    return tuple(found.values())


def _check_rebuilds(sae: Any, name: str) -> None:
    """See that an SAE gives back the rows that it was given.

    Raises:
        JobError: it is a transcoder, or one that looks at several rows.
    """
    is_transcoder = hasattr(getattr(sae, "cfg", None), "d_out")
    if is_transcoder or type(sae).__name__.startswith("Temporal"):
        raise JobError(
            f"{name} is {type(sae).__name__}; only SAEs that rebuild each row from itself can be evaluated"
        )


def _named(given: Any) -> Iterator[tuple[str, Any, int | None]]:
    """Name, SAE, and rows that it was trained on."""
    if isinstance(given, Mapping):
        for name, one in given.items():
            if _is_path(one):
                yield from _in_folder(local_path(one, "the SAE"), str(name))
            else:
                yield str(name), one, None
    elif isinstance(given, list | tuple):
        for number, one in enumerate(given):
            if _is_path(one):
                yield from _in_folder(local_path(one, "the SAE"))
            else:
                yield f"sae {number}", one, None
    elif _is_path(given):
        yield from _in_folder(local_path(given, "the SAE"))
    else:
        yield "sae", given, None


def _is_path(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)


def _in_folder(folder: Path, name: str | None = None) -> Iterator[tuple[str, Any, int | None]]:
    """The SAE of a folder, or those in folders below it, in the order of their numbers.

    Raises:
        JobError: there is none.
    """
    if (folder / sae_lens_objects.CONFIG).is_file():
        yield name or folder.name, sae_lens_objects.load(folder), _samples(folder)
        return
    below = {
        config.parent
        for depth in range(1, _DEEPEST + 1)
        for config in folder.glob("/".join(["*"] * depth) + f"/{sae_lens_objects.CONFIG}")
    }
    if not below:
        raise JobError(
            f"{folder} holds no SAE: neither it nor a folder in it has a {sae_lens_objects.CONFIG}; name the folder "
            "that SAELens or actstore train-sae wrote"
        )
    prefix = "" if name is None else f"{name}/"
    for one in sorted(below, key=lambda path: _natural(str(path.relative_to(folder)))):
        yield f"{prefix}{one.relative_to(folder)}", sae_lens_objects.load(one), _samples(one)


def _samples(folder: Path) -> int | None:
    name = _SAMPLES.fullmatch(folder.name)
    return int(name[1]) if name else None


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A key by which 900 comes before 4096, and names come after numbers."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)|/", text)
        if part
    ]
