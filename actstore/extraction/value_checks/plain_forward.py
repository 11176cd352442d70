"""Values of hooks from the plain Hugging Face forward of some rows."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actstore.hooks.capture.exclusive import exclusive
from actstore.hooks.families.site import AnySite, Site, sites_in_layer, sites_outside
from actstore.hooks.naming.hook_points import point_of
from actstore.hooks.naming.names import join, split

if TYPE_CHECKING:
    import torch
    from torch import nn

    from actstore.hooks.model import HookedModel


def plain_values(
    model: "HookedModel",
    ids: "torch.Tensor",
    hooks: Sequence[str],
    *,
    rows: Sequence[int] = (0,),
    has_streams: bool = True,
) -> "dict[str, torch.Tensor]":
    """The values [row, position, *shape] of some rows of a batch, from the unmodified model.

    The stream comes from ``output_hidden_states``; inputs and outputs of modules of Hugging Face, and parts of them,
    come from plain PyTorch hooks. What no module shows (scores, patterns, rotated queries and keys, the inside of
    norms, probabilities of experts) is captured as in extraction: this checks the order of rows, the batching, the
    padding and the copies, while `actstore.hooks.model_checks.self_check` has checked the values themselves.

    Args:
        model: the model; it may have only the layers that these hooks need.
        ids: token ids [batch, position] on any device.
        hooks: canonical names.
        rows: rows of the batch.
        has_streams: whether to ask for the hidden states of all layers, which are kept for the whole batch; if not,
            the stream comes from PyTorch hooks on the layers.
    """
    ids = ids.to(model.device)
    sites = {hook: _site(model, hook) for hook in hooks}
    shown = {hook: site for hook, site in sites.items() if isinstance(site, Site)}
    values = _forward(model, ids, shown, list(rows), has_streams=has_streams) if shown else {}
    hidden = [hook for hook in hooks if hook not in shown]
    if hidden:
        values |= _capture(model, ids, hidden, list(rows))
    return {hook: values[hook] for hook in hooks}


def positions_first(hook: str, value: "torch.Tensor") -> "torch.Tensor":
    """A value from `HookedModel.run` with its axes as in stores: [batch, position, *shape]."""
    point = point_of(hook)
    assert point is not None
    return value.movedim(point.position_axis, 1)


def is_length_in_rotation(config: Any) -> bool:
    """Whether rotations depend on the length of the row, so that a row without its padding has other values."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return any(
        isinstance(rotation, dict) and rotation.get("rope_type") in ("dynamic", "longrope")
        for rotation in (parameters, *parameters.values())  # of the model, or of each kind of layer
    )


def _site(model: "HookedModel", hook: str) -> AnySite:
    layer, leaf = split(hook)
    sites = (
        sites_outside(model.architecture)
        if layer is None
        else sites_in_layer(model.architecture, model.cfg, layer)
    )
    return sites[leaf]


def _forward(
    model: "HookedModel",
    ids: "torch.Tensor",
    sites: Mapping[str, Site],
    rows: list[int],
    *,
    has_streams: bool,
) -> "dict[str, torch.Tensor]":
    """Values [row, position, *shape] from one forward as transformers offers it."""
    import torch

    values: dict[str, torch.Tensor] = {}
    n_rows, length = ids.shape

    def keep(hook: str, value: torch.Tensor) -> None:
        # Some modules see rows and positions as one axis; position embeddings are the same in every row.
        batch = value.reshape(-1, length, value.shape[-1]).expand(n_rows, -1, -1)
        values[hook] = sites[hook].part.view(batch[rows])  # a copy: later modules may write into the value

    with (
        exclusive(model.base),
        _unchanged(model.base),
        torch.inference_mode(),
        contextlib.ExitStack() as stack,
    ):
        for hook, site in sites.items():
            layer = split(hook)[0]
            root: nn.Module = model.base if layer is None else model.layers[layer]
            handle = _watch(root.get_submodule(site.module), site.side, hook, keep)
            stack.callback(handle.remove)
        first = _Passing(model.layers[0])
        stack.callback(first.remove)
        output = model.base(input_ids=ids, use_cache=False, output_hidden_states=has_streams)
    states = output.hidden_states if has_streams else None
    if states is not None:
        for hook, stream in _streams(states, first, len(model.layers)).items():
            if hook in sites:
                values[hook] = stream[rows]
    return values


class _Passing:
    """Keeps the input and the output of a layer."""

    def __init__(self, layer: "nn.Module") -> None:
        self.before: torch.Tensor | None = None
        self.after: torch.Tensor | None = None
        self._handles = [
            _watch(layer, "input", "before", self._keep),
            _watch(layer, "output", "after", self._keep),
        ]

    def _keep(self, side: str, value: "torch.Tensor") -> None:
        setattr(self, side, value.clone())

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _streams(states: "Sequence[torch.Tensor]", first: _Passing, n_layers: int) -> "dict[str, torch.Tensor]":
    """Hidden states by the name of their hook; empty for a family whose hidden states are not those of its layers."""
    import torch

    if len(states) <= n_layers:
        return {}
    if first.before is not None and torch.equal(states[0], first.before):
        outputs = states[1:n_layers]  # transformers applies the final norm to the last
        inputs = states[:n_layers]
    elif first.after is not None and torch.equal(
        states[0], first.after
    ):  # Mamba and RWKV begin with the output of the first layer
        outputs = states[: n_layers - 1]
        inputs = ()
    else:
        return {}
    return {join(layer, "hook_resid_pre"): state for layer, state in enumerate(inputs)} | {
        join(layer, "hook_resid_post"): state for layer, state in enumerate(outputs)
    }


@contextlib.contextmanager
def _unchanged(base: "nn.Module") -> Iterator[None]:
    """Remove what a forward adds to modules. A model that is asked for its hidden states gets PyTorch hooks from
    transformers, and a note that they are there, and every later forward would call them.
    """
    before = [(module, set(vars(module)), set(module._forward_hooks)) for module in base.modules()]
    try:
        yield
    finally:
        for module, names, hooks in before:
            for name in vars(module).keys() - names:
                delattr(module, name)
            for key in module._forward_hooks.keys() - hooks:
                del module._forward_hooks[key]


def _watch(
    module: "nn.Module", side: str, hook: str, keep: "Callable[[str, torch.Tensor], None]"
) -> "torch.utils.hooks.RemovableHandle":
    def before(_module: Any, args: Any, kwargs: Any) -> None:
        keep(hook, args[0] if args else kwargs["hidden_states"])

    def after(_module: Any, _args: Any, output: Any) -> None:
        keep(hook, output[0] if isinstance(output, tuple) else output)

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _capture(
    model: "HookedModel", ids: "torch.Tensor", hooks: Sequence[str], rows: list[int]
) -> "dict[str, torch.Tensor]":
    """Values [row, position, *shape] as extraction captures them."""
    values: dict[str, torch.Tensor] = {}

    def take(hook: str, value: "torch.Tensor") -> None:
        values[hook] = positions_first(hook, value)[rows]

    model.run(ids, hooks, take)
    return values
