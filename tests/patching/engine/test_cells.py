"""Which cells change something is the same however many are looked at together."""

import pytest
import torch

from actstore.patching.engine import cells as module
from actstore.patching.engine.cells import Cells, trimmed


def test_cells_are_trimmed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of the patterns of 2 prompts, 3 heads and 4 positions, in two layers."""
    layers, heads, positions, sources = (
        part.flatten() for part in torch.meshgrid(*map(torch.arange, (2, 3, 4, 4)), indexing="ij")
    )
    generator = torch.Generator().manual_seed(0)
    recorded = torch.randint(0, 2, (2, 2, 3, 4, 4), generator=generator).float()
    new = torch.randint(0, 2, recorded.shape, generator=generator).float()
    cells = Cells("attn.hook_pattern", layers, positions, positions + 1, heads, sources, new.__getitem__)
    expected = (new != recorded)[layers, :, heads, positions, sources]
    for n_at_once in (1, 200, 1 << 24):
        monkeypatch.setattr(module, "_BOOLEANS_AT_ONCE", n_at_once)
        kept, changed = trimmed(cells, recorded.__getitem__, 2)
        assert torch.equal(changed, expected)
        assert torch.equal(kept.starts, positions)
