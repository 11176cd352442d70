"""Options of commands that look at features: directions, neurons or an SAE."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

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


@dataclass(frozen=True)
class GivenFeatures:
    """What the options of features mean."""

    of: Any
    """As `actstore.analysis` takes it: numbers of neurons, directions [n, d], or an SAE."""
    n: int
    """How many these are."""
    chosen: list[int] | None
    """Those of the directions or latents that are asked for; None for all."""

    @property
    def numbers(self) -> list[int]:
        """The number of each feature that is asked for, among neurons, directions or latents."""
        if isinstance(self.of, list):
            return self.of
        return list(range(self.n)) if self.chosen is None else self.chosen

    @property
    def only_chosen(self) -> Any:
        """As `of`, without the directions or latents that are not asked for."""
        if isinstance(self.of, list):
            return self.of
        if isinstance(self.of, np.ndarray):
            return self.of[self.numbers]
        from actstore.analysis.features import Encoded

        return Encoded(self.of, None if self.chosen is None else tuple(self.chosen))


def given_features(
    directions: str | None,
    neurons: slice | list[int] | None,
    sae: str | None,
    features: slice | list[int] | None,
    size: int,
) -> GivenFeatures:
    """What is asked for.

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
        return GivenFeatures(numbers, len(numbers), None)
    of: Any
    if directions is not None:
        from actstore.analysis.direction_files import read_directions

        of = read_directions(Path(directions))
        n = len(of)
    else:
        from actstore.analysis.sae_lens_objects import load

        assert sae is not None
        of = load(Path(sae))
        n = int(of.cfg.d_sae)
    return GivenFeatures(of, n, None if features is None else _numbers(features, n, "features"))


def _numbers(chosen: slice | list[int], n: int, noun: str) -> list[int]:
    numbers = list(range(n))[chosen] if isinstance(chosen, slice) else chosen
    if not numbers or min(numbers) < 0 or max(numbers) >= n:
        raise JobError(f"there are {noun} 0 to {n - 1}, and --{noun} is {chosen}; choose some of them")
    return numbers
