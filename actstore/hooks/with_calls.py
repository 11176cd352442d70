"""The part of a hooked model that knows what a call asks for, and checks it before anything is computed."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from actstore.errors import HookError, TokensError
from actstore.hooks.call import Call, layer_number
from actstore.hooks.loss import ReturnType, next_token_loss
from actstore.hooks.model_checks.left_padding import has_left_padding, ignores_left_padding
from actstore.hooks.model_checks.skipped_layers import starts_at
from actstore.hooks.text.inputs import as_mask
from actstore.hooks.text.past import check_past
from actstore.hooks.text.prompts import PaddingSide
from actstore.hooks.text.residual import as_residual
from actstore.hooks.with_saes import WithSaes

if TYPE_CHECKING:
    import torch


class WithCalls(WithSaes):
    """The arguments of a call, and what belongs to them: padding, streams to start from, the loss."""

    def __init__(self, model: Any, tokenizer: Any = None, *, prepend_bos: bool | None = None) -> None:
        """Wrap a model without running it; arguments are those of `actstore.HookedModel`."""
        super().__init__(model, tokenizer, prepend_bos=prepend_bos)
        self._starts: dict[int, bool] = {}

    def input_to_embed(
        self,
        input: "str | Sequence[str] | torch.Tensor",  # noqa: A002 - TransformerLens' name
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: "torch.Tensor | None" = None,
    ) -> "tuple[torch.Tensor, torch.Tensor, None, torch.Tensor | None]":
        """The stream into the first layer, for ``start_at_layer=0``; functions on hooks of embeddings are called.

        Returns:
            (stream [batch, position, d_model], ids [batch, position], None, mask [batch, position] or None)
        """
        ids, mask = self._input(input, prepend_bos, padding_side, attention_mask)
        stream = self(ids, stop_at_layer=0, attention_mask=mask)
        return stream, ids, None, mask

    def loss_fn(
        self,
        logits: "torch.Tensor",
        tokens: "torch.Tensor",
        attention_mask: "torch.Tensor | None" = None,
        per_token: bool = False,
    ) -> "torch.Tensor":
        """Cross-entropy of each next token in nats: the mean, or that of each [batch, position - 1].

        Args:
            logits: [batch, position, d_vocab].
            tokens: ids [batch, position].
            attention_mask: [batch, position], 0 at padding.
            per_token: give the loss of each token.
        """
        mask = None if attention_mask is None else as_mask(attention_mask, tokens).to(logits.device)
        return next_token_loss(logits, tokens.to(logits.device), mask, per_token=per_token)

    def _asked(
        self,
        given: Any,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: "torch.Tensor | None" = None,
        attention_mask: "torch.Tensor | None" = None,
        past_kv_cache: Any = None,
        grad: bool = False,
        has_graph: bool = False,
    ) -> Call:
        """A call with these arguments, which are those of `__call__`, checked."""
        import torch

        n_layers, n_ctx = self.cfg.n_layers, self.cfg.n_ctx
        start = 0 if start_at_layer is None else layer_number(start_at_layer, n_layers, "start_at_layer")
        stop = None if stop_at_layer is None else layer_number(stop_at_layer, n_layers, "stop_at_layer")
        residual = mask = None
        if start_at_layer is None:
            if tokens is not None:
                raise TokensError("tokens go with start_at_layer; otherwise they are the input itself")
            if past_kv_cache is not None:
                check_past(past_kv_cache, is_known=self.architecture.attention is not None)
            ids, mask = self._input(given, prepend_bos, padding_side, attention_mask, past=past_kv_cache)
        else:
            residual = as_residual(given, self.cfg.d_model, n_ctx).to(self.device, self.dtype)
            if tokens is None:
                ids = torch.zeros(residual.shape[:2], dtype=torch.int64, device=self.device)
            else:
                ids = self._input(tokens, None, None, None)[0]
                if ids.shape != residual.shape[:2]:
                    raise TokensError(
                        f"tokens have shape {list(ids.shape)}, and the stream {list(residual.shape[:2])} positions"
                    )
            self._check_start(start)
            if attention_mask is not None:
                mask = as_mask(attention_mask, ids).to(self.device)
                self._check_padding(mask)
        waits = bool(self._functions.names_for_gradients) and torch.is_grad_enabled()
        call = Call(
            ids,
            mask,
            residual,
            start,
            stop,
            past_kv_cache,
            return_type,
            loss_per_token,
            has_graph=grad or has_graph or waits,
        )
        call.check(has_head=self.has_head, has_tokens=residual is None or tokens is not None)
        return call

    def _check_start(self, layer: int) -> None:
        # Families in the table hand nothing but the stream from layer to layer; other families are tried out.
        if layer not in self._starts:
            is_known = self.architecture.attention is not None or layer == 0
            self._starts[layer] = is_known or starts_at(self._forward, self.cfg, self.device, layer)
        if not self._starts[layer]:
            raise HookError(
                f"layers of this {self.cfg.model_type} model need more of those before them than the residual stream, "
                "so a forward cannot start in between; edit hook_resid_pre of that layer in a whole forward"
            )

    @cached_property
    def _ignores_left_padding(self) -> bool:
        # Families in the table pass the mask to attention; other families are tried out.
        return self.architecture.attention is not None or ignores_left_padding(
            self._forward, self.cfg, self.device
        )

    def _check_padding(self, mask: "torch.Tensor") -> None:
        if has_left_padding(mask) and not self._ignores_left_padding:
            raise TokensError(
                f"this {self.cfg.model_type} model computes with padding in front of a row, whatever the mask says; "
                "pad on the right (padding_side='right')"
            )
