"""Whether packed rows are exact for a model: rows that nothing changes must come out as they were recorded."""

from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from actstore.errors import ModelError
from actstore.hooks.packing.packed_run import Group, PackedRun

if TYPE_CHECKING:
    from torch import nn

_MOST_POSITIONS: Final = 16
_FEWEST_POSITIONS: Final = 4
"""With fewer positions, hardly anything can be seen of how layers join them."""
_DRIFT: Final = {"torch.float32": 1e-3, "torch.float64": 1e-6}
_DRIFT_OF_HALVES: Final = 0.1
"""How far unpatched rows may end from the recorded run, as a share of their norm. Rounding stays a hundred times below;
a model whose layers mix positions outside of attention is far above.
"""
_exact: "Final[WeakSet[nn.Module]]" = WeakSet()
"""Models for which packed rows were exact, so that they are not probed for every run."""


def check_exact(run: PackedRun, base: "nn.Module") -> None:
    """Probe a model, unless it was found exact before.

    Raises:
        ModelError: packed rows are not exact.
    """
    if base in _exact:
        return
    check_drift(run, drift_of_layers(run))
    if run.length >= _FEWEST_POSITIONS:
        _exact.add(base)


def check_drift(run: PackedRun, drift: float) -> None:
    """Check that unpatched rows ended where the recorded run did.

    Args:
        run: the recorded run.
        drift: their distance from it, as a share of the norm.

    Raises:
        ModelError: they did not, so packed rows are not exact for this model.
    """
    if not drift <= _DRIFT.get(str(run.streams[0].dtype), _DRIFT_OF_HALVES):
        raise ModelError(
            f"unpatched rows ended {drift:.1g} of their norm away from the whole forward, so layers of this "
            f"{run.model_type} model join positions outside of attention"
        )


def drift_of_layers(run: PackedRun) -> float:
    """How far packed rows come out of each layer from the recorded run, as the largest share of a norm.

    A row that begins in the middle lies before two that begin at the first position and end before the last one. So no
    position has the same tokens around it as in its prompt, and what joins positions outside of attention shows.
    """
    import torch

    length = min(run.length, _MOST_POSITIONS)
    middle, last = length // 2, max(length - 1, 1)
    prompts = torch.zeros(2, dtype=torch.long)
    groups = [Group(prompts[:1], middle, length, True), Group(prompts, 0, last, True)]
    shares = []
    for layer in range(len(run.streams) - 1):
        before, after = (
            torch.cat([stream[0, middle:length], stream[0, :last], stream[0, :last]])
            for stream in run.streams[layer : layer + 2]
        )
        difference = run.layer(layer, before, groups).float() - after.float()
        shares.append((difference.norm(dim=-1) / after.float().norm(dim=-1)).max())
    return float(torch.stack(shares).max())
