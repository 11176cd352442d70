"""A look at whether packed rows are exact for a model, before cells are computed."""

from typing import Final

from actstore.hooks.packing.packed_run import Group, PackedRun

_MOST_POSITIONS: Final = 16


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
