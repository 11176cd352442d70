"""Finding out whether a model ignores padding in front of a row, by running it."""

from typing import TYPE_CHECKING

from actstore.hooks.capture.forward import Forward
from actstore.hooks.capture.visitor import Handing
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.naming.names import join

if TYPE_CHECKING:
    import torch


_N_TOKENS = 6
_N_PADDING = 2
_TOLERANCE = 0.1
"""Largest difference, as a share of the largest value. Rounding makes far smaller ones, padding that enters a state
ones of about 1."""


def has_left_padding(mask: "torch.Tensor") -> bool:
    """Whether padding comes before a token in a row of a mask [batch, position], 1 at tokens."""
    return bool((mask[:, :-1] < mask[:, 1:]).any())


def ignores_left_padding(forward: Forward, cfg: HookedConfig, device: "torch.device") -> bool:
    """Whether the stream out of the last layer is the same for one short row with and without padding in front.

    RWKV and xLSTM take the padding into their state, whatever the mask says.
    """
    import torch

    row = (torch.arange(_N_TOKENS, device=device) * 7919 % cfg.d_vocab)[None]
    mask = torch.ones_like(row)
    padded = torch.nn.functional.pad(row, (_N_PADDING, 0))
    hook = join(cfg.n_layers - 1, "hook_resid_post")
    unpadded = _stream(forward, hook, row, mask)
    after_padding = _stream(forward, hook, padded, torch.nn.functional.pad(mask, (_N_PADDING, 0)))[
        :, _N_PADDING:
    ]
    return bool((unpadded - after_padding).abs().max() <= _TOLERANCE * unpadded.abs().max())


def _stream(forward: Forward, hook: str, ids: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    values: list[torch.Tensor] = []
    visitor = Handing([hook], lambda _name, value: values.append(value.clone()))
    forward.run(ids, visitor, [hook], mask=mask, has_logits=False)
    return values[0]
