"""What arrives at receivers directly from senders.

Heads and MLPs beside the senders are frozen at the values of the corrupted run. So what a receiver reads differs from
that run by what senders write to the stream, and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.patching.paths.nodes import Receiver

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Clean:
    """The clean values of senders. Each gives those of a layer."""

    z: "Callable[[int], torch.Tensor]"
    """[prompt, position, head, d_head]"""
    mlp: "Callable[[int], torch.Tensor]"
    """The output of the MLP [prompt, position, d_model]."""


@dataclass(frozen=True)
class Arrived:
    """What arrives from each group of senders."""

    start: int
    """First position of the values and logits; before it, nothing differs from the corrupted run."""
    values: "dict[Receiver, torch.Tensor]"
    """By receiver, the value of its hook [group, prompt, position, ...], of one head if it is one. The logits are not
    among them, and neither are receivers that come before all senders.
    """
    logits: "torch.Tensor | None"
    """[group, prompt, position, d_vocab], if they receive; before ``start``, they are those of the corrupted run."""
