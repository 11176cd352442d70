"""On a real model: how well estimates follow exact grids, of a prompt about the Eiffel Tower."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from actstore import patching
from actstore.hooks.model import HookedModel

CORRELATIONS = {
    "resid_pre": {"atp": 0.69, "relp": 0.95},
    "attn_out": {"atp": 0.93, "relp": 0.90},
    "mlp_out": {"atp": 0.43, "relp": 0.83},
    "z": {"atp": 0.97, "relp": 0.88},
}
"""Measured; heads over all positions."""


@pytest.mark.faults
def test_estimates_follow_exact_grids(smollm2: Path) -> None:
    model = HookedModel.from_pretrained(smollm2, dtype="float32", device="cpu")
    clean, corrupted = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"
    paris, rome = model.to_single_token(" Paris"), model.to_single_token(" Rome")

    def difference(logits: Tensor) -> Tensor:
        return logits[:, -1, paris] - logits[:, -1, rome]

    for hook, expected in CORRELATIONS.items():
        axes = ("layer", "head") if hook == "z" else ("layer", "pos")
        exact = patching.grid(model, corrupted, clean, difference, hook, axes, positions=-1)
        assert exact.engine == "packed rows"
        for method in ("atp", "relp"):
            estimate = patching.attribution(
                model, corrupted, clean, difference, method=method, hooks=hook, axes=axes, positions=-1
            )
            pair = torch.stack([estimate.difference.flatten(), exact.difference.flatten()])
            assert float(torch.corrcoef(pair)[0, 1]) == pytest.approx(expected[method], abs=0.02), (
                hook,
                method,
            )


@pytest.mark.faults
def test_edges_to_an_mlp_are_those_of_its_input(smollm2: Path) -> None:
    """Of a small step, what `hook_mlp_in` gives when it is changed by hand."""
    model = HookedModel.from_pretrained(smollm2, dtype="float32", device="cpu")
    clean = model.to_tokens("The Eiffel Tower is in the city of")
    corrupted = model.to_tokens("The Colosseum is in the city of")

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 7] - logits[:, -1, 9]

    edges = patching.edge_scores(model, corrupted, clean, metric)
    _, there = model.run_with_cache(clean, names_filter="*mlp_out")
    _, here = model.run_with_cache(corrupted, names_filter="*mlp_out")
    for writer, reader in ((0, 2), (0, 9), (5, 6), (20, 29)):
        step = 1e-2 * (there["mlp_out", writer] - here["mlp_out", writer])

        def end(sign: int, reader: int = reader, step: Tensor = step) -> float:
            def changed(value: Tensor, hook: object) -> Tensor:
                return value + sign * step

            return float(metric(model.run_with_hooks(corrupted, fwd_hooks=[(("mlp_in", reader), changed)])))

        expected = (end(1) - end(-1)) / 2e-2
        assert edges[f"m{writer}", f"m{reader}"] == pytest.approx(expected, rel=0.05, abs=5e-3)
