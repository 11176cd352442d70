"""Options of commands that look at features: directions, neurons or an SAE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from actstore.cli.options.ranges import Places
from actstore.errors import JobError

_OPTIONS = (
    click.option(
        "--of",
        "directions",
        metavar="FILE",
        help="Directions [n_features, d]: a .npy, or a .safetensors with one tensor.",
    ),
    click.option("--neurons", type=Places(), help="Elements of the hook's value."),
    click.option("--sae", metavar="FOLDER", help="An SAE that SAELens or actstore train-sae wrote."),
    click.option("--features", type=Places(), help="Which of the directions or latents. Default: all."),
)


def feature_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a click command, which passes their values to `given_features`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given_features(
    directions: str | None,
    neurons: slice | list[int] | None,
    sae: str | None,
    features: slice | list[int] | None,
    size: int,
) -> tuple[Any, list[int]]:
    """What is asked for, as `actstore.analysis` takes it, and the number of each feature.

    Args:
        directions, neurons, sae, features: values of the options.
        size: number of elements of the hook's value.

    Raises:
        JobError: not exactly one of them is given, or it does not fit.
        MissingExtraError: SAELens is not installed.
        StorageError: a file cannot be read.
    """
    if sum(one is not None for one in (directions, neurons, sae)) != 1:
        raise JobError(
            "which features is said by one of --of FILE, --neurons N,N and --sae FOLDER; give one of them"
        )
    if neurons is not None:
        if features is not None:
            raise JobError(
                "--features is of directions and latents; name the neurons themselves with --neurons"
            )
        numbers = _numbers(neurons, size, "neurons")
        return numbers, numbers
    if directions is not None:
        from actstore.analysis.direction_files import read_directions

        rows = read_directions(Path(directions))
        numbers = _numbers(features, len(rows), "features")
        return rows[numbers], numbers
    from actstore.analysis.features import Encoded
    from actstore.analysis.sae_lens_objects import load

    assert sae is not None
    loaded = load(Path(sae))
    numbers = _numbers(features, int(loaded.cfg.d_sae), "features")
    return Encoded(loaded, None if features is None else tuple(numbers)), numbers


def _numbers(chosen: slice | list[int] | None, n: int, noun: str) -> list[int]:
    if chosen is None or isinstance(chosen, slice):
        numbers = list(range(n))[slice(None) if chosen is None else chosen]
    else:
        numbers = chosen
    if not numbers or min(numbers) < 0 or max(numbers) >= n:
        raise JobError(f"there are {noun} 0 to {n - 1}, and --{noun} is {chosen}; choose some of them")
    return numbers
