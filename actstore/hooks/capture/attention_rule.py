"""The rule of an attention layer: how queries and keys become scores, and scores a pattern."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class AttentionRule:
    """How scores become a pattern in one layer."""

    def __init__(
        self,
        *,
        scaling: float,
        is_causal: bool | None,
        mask: "torch.Tensor | None",
        softcap: float | None = None,
        window: int | None = None,
        sinks: "torch.Tensor | None" = None,
        local: "torch.Tensor | None" = None,
        offset: int = 0,
    ) -> None:
        """
        Args:
            scaling: what products of queries and keys are multiplied by.
            is_causal: whether a position sees none after it; None for yes.
            mask: the mask of the model [rows or 1, 1 or head, query, source_position], or [rows, source_position].
            softcap: bound of scores; None for none.
            window: how many positions a position sees, itself included; None for all.
            sinks: score of the sink of each head.
            local: True where a position sees the other [1, 1, query, source_position].
            offset: source position of the first query, which is the number of keys that a cache already held.
        """
        self.scaling = scaling
        self.softcap = softcap
        self.window = window
        self.sinks = sinks
        self.is_causal = is_causal is not False
        self.mask = mask
        self.local = local
        self.offset = offset

    @property
    def is_plain(self) -> bool:
        """Whether scores are products of queries and keys, scaled, and all that is hidden is hidden whole."""
        has_bias = (
            self.mask is not None
            and self.mask.dtype.is_floating_point
            and bool(((self.mask != 0) & (self.mask > -1e30)).any())
        )
        return self.softcap is None and self.sinks is None and not has_bias

    def scores(
        self, query: "torch.Tensor", key: "torch.Tensor", rows: slice, first: int = 0
    ) -> "torch.Tensor":
        """Scores, float32 [rows, head, position, source_position]; -inf where a position does not see the other.

        Args:
            query: queries [batch, head, position, d_head].
            key: keys [batch, kv_head, source_position, d_head].
            rows: rows of the batch to compute.
            first: number of the first query among those that attention was called with.
        """
        query, key = query[rows].float(), key[rows].float()
        batch, n_heads, length, _ = query.shape
        groups = n_heads // key.shape[1]
        # Heads that share keys are positions to the product, so that keys are not repeated.
        shared = query.reshape(batch, key.shape[1], groups * length, -1)
        scores = (shared @ key.transpose(-1, -2)).view(batch, n_heads, length, -1) * self.scaling
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        hidden = self.hidden(rows, length, scores.shape[-1], scores.device, first)
        bias = self.mask
        if bias is not None and bias.dtype.is_floating_point and bias.ndim == 4:
            bias = _of(bias, rows)[..., first : first + length, : scores.shape[-1]]
            scores = scores + bias.float().clamp(min=-1e30)
        return scores if hidden is None else scores.masked_fill_(hidden, -math.inf)

    def hidden(
        self, rows: slice, length: int, n_sources: int, device: "torch.device", first: int = 0
    ) -> "torch.Tensor | None":
        """True where a position does not see the other [rows or 1, 1, position, source_position]; None if all do."""
        import torch

        hidden: torch.Tensor | None = None
        if self.mask is None or self.mask.ndim == 2:
            # Without a full mask, the kernel gets is_causal and the window.
            begin = self.offset + first
            positions = torch.arange(begin, begin + length, device=device)
            ahead = torch.arange(n_sources, device=device) - positions[:, None]
            if self.is_causal:
                hidden = (ahead > 0)[None, None]
            if self.window is not None:
                outside = (ahead <= -self.window)[None, None]
                hidden = outside if hidden is None else hidden | outside
        if self.mask is not None:
            mask = _of(self.mask, rows)
            if mask.ndim == 2:
                masked = ~mask.bool()[:, None, None, :n_sources]
            elif mask.dtype.is_floating_point:
                masked = mask[..., first : first + length, :n_sources] <= torch.finfo(mask.dtype).min / 2
            else:
                masked = ~mask.bool()[..., first : first + length, :n_sources]
            hidden = masked if hidden is None else hidden | masked
        if self.local is not None:
            beyond = ~self.local[..., first : first + length, :n_sources]
            hidden = beyond if hidden is None else hidden | beyond
        return hidden

    def pattern(self, scores: "torch.Tensor") -> "torch.Tensor":
        """The pattern of scores, float32 of the same shape; rows of positions that see nothing are 0."""
        import torch

        scores = scores.float()
        if self.sinks is not None:
            # A sink is one more source, which takes its share of the weight and gives nothing.
            sinks = self.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
        if self.mask is None:
            return torch.softmax(scores, dim=-1)
        # Only padding leaves a position with nothing to see; its softmax and gradient would be NaN.
        blind = scores.isneginf().all(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)


def _of(mask: "torch.Tensor", rows: slice) -> "torch.Tensor":
    return mask if mask.shape[0] == 1 else mask[rows]
