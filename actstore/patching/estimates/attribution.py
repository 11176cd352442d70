"""Estimates of whole grids by attribution patching or RelP, with the largest cells computed exactly."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, overload

from actstore.errors import HookError, PatchError
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.hook_points import BY_LEAF
from actstore.hooks.naming.names import join
from actstore.patching.axes import leaf_of, sizes_of
from actstore.patching.clean import CleanRun, clean_run
from actstore.patching.engine.cells import PATTERNS
from actstore.patching.engine.computed import Computed, computed
from actstore.patching.engine.metric import Metric, positions_of
from actstore.patching.estimates.exact_cells import Chosen, chosen_cells, correlation, recall, subset
from actstore.patching.estimates.grid_estimate import Estimate
from actstore.patching.estimates.relevance_rules import relevance_rules
from actstore.patching.estimates.runs import CorruptedRun, corrupted_run
from actstore.patching.grid import cells_of, default_tokens, labelled, tokens_of

if TYPE_CHECKING:
    import torch

Method = Literal["atp", "relp"]

_AXES: Final[Mapping[str, tuple[str, ...]]] = {
    "position": ("pos", "dest_pos"),
    "source_position": ("src_pos",),
    "head": ("head", "head_index"),
    "kv_head": ("head", "head_index"),
    "d_mlp": ("neuron",),
}
"""What a grid calls the axes of a value."""


@overload
def attribution(
    model: HookedModel,
    corrupted: "torch.Tensor | str | Sequence[str]",
    clean: Any,
    metric: Metric,
    *,
    hooks: str,
    method: Method = "atp",
    axes: Sequence[str] | None = None,
    positions: "int | Sequence[int] | None" = None,
    refine: int = 0,
    sample: int = 0,
    seed: int = 0,
    max_tokens: int | None = None,
) -> Estimate: ...


@overload
def attribution(
    model: HookedModel,
    corrupted: "torch.Tensor | str | Sequence[str]",
    clean: Any,
    metric: Metric,
    *,
    hooks: Sequence[str] = ...,
    method: Method = "atp",
    axes: Sequence[str] | None = None,
    positions: "int | Sequence[int] | None" = None,
    refine: int = 0,
    sample: int = 0,
    seed: int = 0,
    max_tokens: int | None = None,
) -> dict[str, Estimate]: ...


def attribution(
    model: HookedModel,
    corrupted: "torch.Tensor | str | Sequence[str]",
    clean: Any,
    metric: Metric,
    *,
    method: Method = "atp",
    hooks: str | Sequence[str] = ("resid_pre", "attn_out", "mlp_out", "z"),
    axes: Sequence[str] | None = None,
    positions: "int | Sequence[int] | None" = None,
    refine: int = 0,
    sample: int = 0,
    seed: int = 0,
    max_tokens: int | None = None,
) -> Estimate | dict[str, Estimate]:
    """Estimate every cell of the grids of some hooks, in two forwards and one backward pass for all of them.

    The estimate of a cell is the step from its corrupted to its clean value, times the gradient of the metric in the
    corrupted run (attribution patching), or times a coefficient of relevance (RelP, arXiv 2508.21258), which holds the
    scales of norms and patterns constant and takes activation functions for multiplications.

    Args:
        model: the model.
        corrupted: prompts [prompt, position] as ids, or text.
        clean: a cache, of a live run or of a store, or prompts; see `actstore.patching.grid`.
        metric: takes logits [prompt, position, d_vocab], and gives one number, or one for each prompt, as a tensor with
            a gradient.
        method: ``atp`` for gradients, ``relp`` for coefficients of relevance.
        hooks: the hooks, in shorthand: one, or several.
        axes: the axes of the grids, as for `actstore.patching.grid`; None for all that a hook has: layer and position,
            heads, neurons.
        positions: positions whose logits the metric needs, such as -1; None for all.
        refine: how many cells of each hook to compute exactly: those with the largest estimates.
        sample: how many cells of each hook to draw at random and compute exactly, to judge the estimate by.
        seed: seed of the draw.
        max_tokens: tokens on the way at once when cells are computed; None for an eighth of free memory.

    Returns:
        The estimate of the hook; or for several hooks, one for each, by the name that was given.

    Raises:
        HookError: a hook is missing, or has no gradient or coefficient.
        PatchError: prompts that do not line up, a metric without a gradient, an axis that a hook does not have.
        ModelError: the model has no head, or RelP has no rule for one of its parts.
    """
    began = time.perf_counter()
    if method not in ("atp", "relp"):
        raise PatchError(f"method is {method!r}; choose 'atp' or 'relp'")
    if refine < 0 or sample < 0:
        raise PatchError(f"refine is {refine} and sample {sample}; give numbers of cells from 0 on")
    tokens = tokens_of(model, corrupted)
    chosen = positions_of(positions, tokens.shape[1])
    leaves = {hook: leaf_of(model.names, hook) for hook in ([hooks] if isinstance(hooks, str) else hooks)}
    if not leaves:
        raise HookError("there are no hooks; name at least one")
    grids = {
        hook: _Grid(model, leaf, _axes_of(leaf) if axes is None else tuple(axes), tokens)
        for hook, leaf in leaves.items()
    }
    rules = relevance_rules(model, {leaf: hook for hook, leaf in leaves.items()}) if method == "relp" else []
    layers = range(model.cfg.n_layers)
    clean_side = clean_run(model, clean, dict.fromkeys(leaves.values(), layers), metric, chosen, tokens.shape)
    names = [join(layer, leaf) for leaf in leaves.values() for layer in layers]
    corrupted_side = corrupted_run(model, tokens, names, metric, chosen, rules)
    shared = time.perf_counter() - began
    results = {}
    for hook, its_grid in grids.items():
        began = time.perf_counter()
        estimated, can_change = its_grid.estimated(clean_side, corrupted_side)
        picked = chosen_cells(estimated.abs().mean(0), can_change, refine, sample, seed)
        exact = its_grid.computed(clean_side, picked, metric, chosen, max_tokens)
        seconds = shared + time.perf_counter() - began
        results[hook] = _result(
            hook, its_grid, method, estimated, picked, exact, clean_side, corrupted_side, seconds
        )
    return results[hooks] if isinstance(hooks, str) else results


class _Grid:
    """The cells of one hook."""

    def __init__(self, model: HookedModel, leaf: str, axes: tuple[str, ...], tokens: "torch.Tensor") -> None:
        self.model = model
        self.leaf = leaf
        self.axes = axes
        self.tokens = tokens
        self.sizes = sizes_of(model.cfg, leaf, axes, tokens.shape[1])

    def estimated(self, clean: CleanRun, corrupted: CorruptedRun) -> "tuple[torch.Tensor, torch.Tensor]":
        """(estimated difference of each cell, float64 [1 or prompt, cell], whether it replaces anything [cell])."""
        import torch

        n_numbers = len(corrupted.metric)
        layers, changes = [], []
        for layer in range(self.model.cfg.n_layers):
            name = join(layer, self.leaf)
            old, new = corrupted.values[name], clean.values[self.leaf](layer)
            differs = new != old
            # Hidden scores are -inf in both runs, and have no difference.
            step = torch.where(differs, new.float() - old.float(), 0.0)
            layers.append(self._reduced(step * corrupted.gradients[name].float()))
            changes.append(self._reduced(differs.float()).sum(0) > 0)
        products = torch.stack(layers, 1)  # [prompt, layer, cell of a layer]
        numbers = products if n_numbers > 1 else products.sum(0, keepdim=True)
        return numbers.flatten(1).double().cpu(), torch.stack(changes).flatten().cpu()

    def _reduced(self, products: "torch.Tensor") -> "torch.Tensor":
        """Products summed over what is no axis of the grid [prompt, cell of the layer], the last axis fastest."""
        places = []
        for axis in self.axes[1:]:
            own = BY_LEAF[self.leaf].axes
            (place,) = (index for index, name in enumerate(own) if axis in _AXES.get(name, ()))
            places.append(1 + place)
        rest = [place for place in range(1, products.ndim) if place not in places]
        moved = products.permute(0, *places, *rest)
        sums = moved.flatten(1 + len(places)).sum(-1) if rest else moved
        return sums.reshape(len(products), -1)

    def computed(
        self,
        clean: CleanRun,
        chosen: Chosen,
        metric: Metric,
        positions: list[int],
        max_tokens: int | None,
    ) -> Computed | None:
        """The cells that were chosen, exactly; None if there are none."""
        if not len(chosen.cells):
            return None
        cells = cells_of(self.leaf, self.axes, self.sizes, self.tokens.shape[1], clean.values[self.leaf])
        return computed(
            self.model,
            self.tokens,
            subset(cells, chosen.cells),
            metric,
            positions,
            max_tokens=max_tokens or default_tokens(self.model, len(self.tokens) * len(positions)),
        )


def _result(
    hook: str,
    its_grid: _Grid,
    method: Method,
    estimated: "torch.Tensor",
    picked: Chosen,
    exact: Computed | None,
    clean: CleanRun,
    corrupted: CorruptedRun,
    seconds: float,
) -> Estimate:
    """Put estimates and exact cells together."""
    import torch

    base = corrupted.metric[:, None]
    estimates = base + estimated
    values, is_exact = estimates.clone(), torch.zeros_like(estimates, dtype=torch.bool)
    pearson = share = None
    if exact is not None:
        values[:, picked.cells] = exact.numbers.T
        is_exact[:, picked.cells] = True
        if bool(picked.is_drawn.any()):
            drawn = picked.cells[picked.is_drawn]
            differences = (exact.numbers.T - exact.corrupted[:, None])[:, picked.is_drawn]
            pearson = correlation(estimated[:, drawn], differences)
            share = recall(estimated[:, drawn].abs().mean(0), differences.abs().mean(0))
    n_numbers = len(estimates)
    shape = (n_numbers, *its_grid.sizes) if n_numbers > 1 else tuple(its_grid.sizes)
    return Estimate(
        values=values.float().view(shape),
        axes=labelled(its_grid.model, its_grid.axes, its_grid.sizes, its_grid.tokens, n_numbers),
        hook=hook,
        model_name=its_grid.model.cfg.model_name,
        corrupted=corrupted.metric.float().squeeze(),
        clean=clean.number,
        engine="estimate" if exact is None else f"estimate, exact cells by {exact.engine}",
        noise_floor=0.0 if exact is None else exact.noise_floor,
        n_skipped=0 if exact is None else exact.n_skipped,
        seconds=seconds,
        method=method,
        estimate=estimates.float().view(shape),
        is_exact=is_exact.view(shape),
        n_sampled=int(picked.is_drawn.sum()),
        correlation=pearson,
        recall=share,
    )


def _axes_of(leaf: str) -> tuple[str, ...]:
    """All axes that a hook has, in the order of `actstore.patching.grid`: layer, position, then the others."""
    if leaf in PATTERNS:
        return ("layer", "head", "dest_pos", "src_pos")
    own = [_AXES[name][0] for name in BY_LEAF[leaf].axes if name in _AXES]
    return ("layer", *own)
