"""Finding out whether layers of a model need nothing of those before them but the residual stream, by running it."""

from typing import TYPE_CHECKING

from actstore.hooks.capture.forward import Forward
from actstore.hooks.capture.visitor import Handing
from actstore.hooks.families.config import HookedConfig

if TYPE_CHECKING:
    import torch

_N_TOKENS = 6
_TOLERANCE = 1e-3
"""Largest difference, as a share of the largest value. Both forwards do the same to the same numbers."""


def starts_at(forward: Forward, cfg: HookedConfig, device: "torch.device", layer: int) -> bool:
    """Whether the stream out of the last layer is the same if the forward starts at a layer.

    Models that hand keys, positions or states from layer to layer, beside the stream, cannot start in between.
    """
    import torch

    row = (torch.arange(_N_TOKENS, device=device) * 7919 % cfg.d_vocab)[None]
    nobody = Handing((), lambda _name, _value: None)
    stream = forward.run(row, nobody, (), stop_at_layer=layer)
    whole = forward.run(row, nobody, (), stop_at_layer=cfg.n_layers)
    try:
        rest = forward.run(row, nobody, (), start_at_layer=layer, residual=stream, stop_at_layer=cfg.n_layers)
    except Exception:  # noqa: BLE001 - whatever such a model misses
        return False
    assert whole is not None
    assert rest is not None
    return bool((whole - rest).abs().max() <= _TOLERANCE * whole.abs().max())
