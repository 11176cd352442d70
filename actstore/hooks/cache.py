"""The activations of a forward, from a live run or from a store, with TransformerLens' methods."""

from typing import TYPE_CHECKING, Any

from actstore.errors import HookError, ModelError, TokensError
from actstore.hooks.components import Components
from actstore.hooks.decomposition import through
from actstore.hooks.names import HookName
from actstore.hooks.position import PositionSlice

if TYPE_CHECKING:
    import torch


class ActivationCache(Components):
    """Hook values [batch, ...]: ``cache["blocks.5.hook_resid_post"]``, ``cache["resid_post", -1]``, ``cache["k6"]``.

    If positions were chosen by an integer when the values were kept (``run_with_cache(pos_slice=3)``), they have no
    position axis, and neither has any result; give no ``pos_slice`` to methods then.
    """

    def stack_activation(
        self, name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> "torch.Tensor":
        """The values of a hook in all layers before one [layer, batch, ...].

        Args:
            name: in short, such as ``resid_post`` or ``pattern``.
            layer: how many layers; None and -1 for all.
            sublayer_type: part of the layer, as in ``("scale", 4, "ln1")``.

        Raises:
            HookError: values are missing.
        """
        end = self._end(layer)
        if end == 0:
            raise HookError("there are no layers before layer 0")
        keys: list[HookName] = [
            (name, each) if sublayer_type is None else (name, each, sublayer_type) for each in range(end)
        ]
        names = [self.names.one(key) for key in keys]
        import torch

        self._require("stack_activation", names)
        return torch.stack([self[each] for each in names])

    def logit_attrs(
        self,
        residual_stack: "torch.Tensor",
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: PositionSlice = None,
        batch_slice: PositionSlice = None,
        has_batch_dim: bool = True,
    ) -> "torch.Tensor":
        """Direct logit attribution: what each part of the stream adds to the logits of tokens [part, batch, position].

        The gain of the final norm is in the directions of the tokens, ``model.folded_W_U[:, token]``; TransformerLens
        gets these by folding the gain into W_U. So the attributions of all parts (`get_full_resid_decomposition`) and
        ``model.folded_b_U[token]`` add up to the logit of the model; in a model with a softcap on its logits
        (Gemma-2), to the logit before it.

        Args:
            residual_stack: [part, batch, position, d_model]; not normed.
            tokens: one token, as text or id; or ids for each row [batch], or for each row and position.
            incorrect_tokens: tokens whose attributions are subtracted.
            pos_slice: positions of the stack.
            batch_slice: rows, to be chosen here from the stack; tokens are those of these rows.
            has_batch_dim: whether the stack has a batch axis.

        Raises:
            HookError: ln_final.hook_scale is missing, or tokens do not fit the stack.
            ModelError: there is no model, or it has no head.
            TokensError: a text is not one token, or an id is not of this model.
        """
        scaled = self.apply_ln_to_stack(
            residual_stack,
            pos_slice=pos_slice,
            batch_slice=batch_slice,
            has_batch_dim=has_batch_dim,
        )
        directions = self._directions(tokens, scaled)
        if incorrect_tokens is not None:
            directions = directions - self._directions(incorrect_tokens, scaled)
        return (scaled * directions).sum(-1)

    def logit_lens(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        pos_slice: PositionSlice = None,
        return_labels: bool = False,
    ) -> Any:
        """The logits that the model would give if it ended before each layer [layer + 1, batch, position, d_vocab].

        Each residual stream goes through the final norm and the head of the model, with a softcap if it has one; so
        the last are the logits of the model.

        Args:
            layer: up to the stream into this layer; None and -1 for all.
            incl_mid: also after attention of each layer.
            pos_slice: positions; choose few, since d_vocab is large.
            return_labels: give (logits, labels), with the labels of `accumulated_resid`.

        Raises:
            HookError: values are missing.
            ModelError: there is no model, or it has no head.
        """
        import torch

        model = self._model("logit_lens")
        if not model.has_head:
            raise ModelError("logit_lens needs the language-model head; load the model with it")
        streams, labels = self.accumulated_resid(layer, incl_mid, pos_slice=pos_slice, return_labels=True)
        head = model.hf.get_output_embeddings()
        logits = torch.stack([through(head, self._final_norm("logit_lens", stream)) for stream in streams])
        cap = self.cfg.output_logits_soft_cap
        if cap is not None:
            logits = (logits / cap).tanh() * cap
        return (logits, labels) if return_labels else logits

    def _directions(self, tokens: Any, stack: "torch.Tensor") -> "torch.Tensor":
        """Columns of folded_W_U, to be multiplied with a stack [part, ..., d_model]."""
        weights = self._weights("logit_attrs")
        ids = self._ids(tokens).to(weights.W_U.device)
        rows = stack.shape[1:-1]
        if ids.ndim and ids.shape not in (rows, rows[:1]):
            raise HookError(
                f"tokens have shape {list(ids.shape)} and the stack has rows and positions {list(rows)}; give one "
                "token, one for each row, or one for each row and position"
            )
        # The same as columns of weights.folded_W_U, which is a whole copy of W_U.
        columns = weights.W_U[:, ids.flatten()].float() * weights.ln_final.w.float()[:, None]
        directions = columns.T.reshape(*ids.shape, -1).detach().to(stack.device)
        if ids.ndim == 1:
            directions = directions.reshape(len(ids), *[1] * (len(rows) - 1), -1)
        return directions

    def _ids(self, tokens: Any) -> "torch.Tensor":
        import torch

        if isinstance(tokens, str):
            tokens = self._model("logit_attrs").to_single_token(tokens)
        elif isinstance(tokens, list | tuple) and any(isinstance(token, str) for token in tokens):
            tokens = [self._model("logit_attrs").to_single_token(token) for token in tokens]
        ids = torch.as_tensor(tokens)
        if ids.is_floating_point() or ids.numel() == 0:
            raise TokensError(f"expected token ids or texts, found {ids.dtype} of shape {list(ids.shape)}")
        wrong = ids[(ids < 0) | (ids >= self.cfg.d_vocab)]
        if wrong.numel():
            raise TokensError(
                f"token id {int(wrong[0])} is outside of the {self.cfg.d_vocab} ids of this model"
            )
        return ids
