"""Joining the values of the steps of a generation into those of one forward over all positions."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from actstore.hooks.capture.functions import HookFunctions
from actstore.hooks.capture.keeping import Keeping
from actstore.hooks.naming.hook_points import point_of, position_axis

if TYPE_CHECKING:
    import torch


class Steps(Keeping):
    """A visitor that calls the functions on hooks and keeps the values of every step."""

    def __init__(
        self, functions: HookFunctions, wanted: Sequence[str], device: "torch.device | str | None"
    ) -> None:
        """
        Args:
            functions: functions on the hooks of the model.
            wanted: canonical names of the hooks whose values are kept.
            device: where values are kept; None for where they are.
        """
        super().__init__(functions, wanted)
        self._device = device
        self._steps: dict[str, list[torch.Tensor]] = {}
        self._is_keeping = True

    def _keep(self, name: str, value: "torch.Tensor") -> None:
        if not self._is_keeping:
            return
        copy = value.clone() if self._device is None else value.to(self._device, copy=True)
        self._steps.setdefault(name, []).append(copy)

    @contextlib.contextmanager
    def not_kept(self) -> Iterator[None]:
        """A context whose steps call the functions alone."""
        self._is_keeping = False
        try:
            yield
        finally:
            self._is_keeping = True

    def joined(self) -> dict[str, "torch.Tensor"]:
        """The values of all positions [batch, position, ...]."""
        return {name: _joined(name, values) for name, values in self._steps.items()}


def _joined(name: str, steps: Sequence["torch.Tensor"]) -> "torch.Tensor":
    """The steps along the axis of positions; positions of an earlier step see none of the later ones."""
    import torch

    point = point_of(name)
    if point is not None and "source_position" in point.axes:
        unseen = -torch.inf if name.endswith("scores") else 0.0
        n_sources = max(step.shape[-1] for step in steps)
        steps = [
            torch.nn.functional.pad(step, (0, n_sources - step.shape[-1]), value=unseen) for step in steps
        ]
    return torch.cat(list(steps), dim=position_axis(name))
