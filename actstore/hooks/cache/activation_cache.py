"""The activations of one forward, from a live run or from a store, with TransformerLens' methods."""

from typing import TYPE_CHECKING, Any

from actstore.errors import HookError, ModelError
from actstore.hooks.cache.cached_values import check_computes, needed_model, require, why_not_computed
from actstore.hooks.cache.components import Components
from actstore.hooks.cache.decomposition import through
from actstore.hooks.cache.derived import together
from actstore.hooks.cache.directions import residual_directions, token_ids
from actstore.hooks.cache.position import PositionSlice
from actstore.hooks.capture.functions import NameFilter, selected
from actstore.hooks.messages.quoted import quoted
from actstore.hooks.naming.names import HookName
from actstore.reason import reason

if TYPE_CHECKING:
    import torch


class ActivationCache(Components):
    """Hook values [batch, ...]: ``cache["blocks.5.hook_resid_post"]``, ``cache["resid_post", -1]``, ``cache["k6"]``.

    ``cache.kind`` says whether they are activations or gradients; see `gradients`.
    """

    def gradients(self, of: "torch.Tensor", names_filter: "NameFilter | None" = None) -> "ActivationCache":
        """The gradients of a number with respect to the values of this cache, which was made with ``grad=True``.

        They are gradients with respect to the very tensors that the forward went on with. No other values are computed
        from them, so ``stack_head_results`` needs gradients of ``attn.hook_result``, which the run must name.

        Args:
            of: a tensor of one number, computed from the output of the run, or from values of this cache.
            names_filter: hooks; None for all hooks in this cache that can have a gradient.

        Raises:
            HookError: a value is not part of the graph of the number, so it has no gradient; or the graph was freed.
        """
        import torch

        if self.kind != "activations":
            raise HookError(f"gradients are those of activations, and {why_not_computed(self)}")
        names = set(self.cache_dict if names_filter is None else selected(self.names, names_filter))
        lacking = names - self.cache_dict.keys()
        if lacking:
            raise HookError(
                f"this cache does not hold {min(lacking)}, so it has no gradient; add it to the run"
            )
        values = {
            name: value for name, value in self.cache_dict.items() if name in names and value.requires_grad
        }
        if not isinstance(of, torch.Tensor) or of.numel() != 1 or not of.requires_grad or not values:
            raise HookError(
                f"expected a tensor of one number, computed from a run with grad=True, found {quoted(of)}; run with "
                "grad=True, and take a mean or a sum of what came out"
            )
        try:
            gradients = torch.autograd.grad(
                of.sum(), list(values.values()), retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            if "second time" not in str(error):
                raise HookError(f"the gradients cannot be computed: {reason(error)}") from error
            raise HookError(
                "the graph of this run has been freed, as backward() and torch.autograd.grad do unless told "
                "retain_graph=True; run again with grad=True"
            ) from error
        for name, gradient in zip(values, gradients, strict=True):
            if gradient is None:
                raise HookError(
                    f"the number was not computed from {name} as this cache holds it, so it has no gradient; leave it "
                    "out of names_filter, and choose rows or positions after"
                )
        return ActivationCache(
            dict(zip(values, gradients, strict=True)),
            self.model,
            self.has_batch_dim,
            names=self.names,
            cfg=self.cfg,
            kind="gradients",
            edited=self._edited,
        )

    def stack_activation(
        self, name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> "torch.Tensor":
        """The values of a hook in all layers before a given one [layer, batch, ...].

        Args:
            name: name in shorthand, such as ``resid_post`` or ``pattern``.
            layer: how many layers; None and -1 for all.
            sublayer_type: part of the layer, as in ``("scale", 4, "ln1")``.

        Raises:
            HookError: values are missing.
        """
        end = self._end(layer)
        if end == 0:
            raise HookError("there are no layers before layer 0")
        keys: list[HookName] = [
            (name, index) if sublayer_type is None else (name, index, sublayer_type) for index in range(end)
        ]
        names = [self.names.one(key) for key in keys]
        import torch

        require(self, "stack_activation", names)
        return torch.stack([self[name] for name in names])

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

        The parts go through the final norm (`apply_ln_to_stack`, with its gain), and are multiplied by the directions
        of the tokens (`HookedModel.tokens_to_residual_directions`). So the attributions of all parts
        (`get_full_resid_decomposition`) and ``model.folded_b_U[token]`` add up to the logit of the model; with a
        softcap on logits (Gemma-2), to the logit before it. TransformerLens gives the same if it has folded the gain
        into W_U.

        Args:
            residual_stack: parts of the stream [part, batch, position, d_model], before the norm.
            tokens: one token, as text or id; or ids for each row [batch], or for each row and position.
            incorrect_tokens: tokens whose attributions are subtracted.
            pos_slice: positions of the stack.
            batch_slice: rows to choose from the stack; tokens are those of these rows.
            has_batch_dim: whether the stack has a batch axis.

        Raises:
            HookError: ln_final.hook_scale is missing, or tokens do not fit the stack.
            ModelError: there is no model, or it has no head.
            TokensError: a text is not one token, or an id is not of this model.
        """
        import torch

        needed_model(self, "logit_attrs")
        wide = torch.promote_types(residual_stack.dtype, torch.float32)
        scaled = self.apply_ln_to_stack(
            residual_stack.to(wide),
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

        Each residual stream goes through the final norm and the head of the model, with its softcap if it has one. The
        last entry is the logits of the model.

        Args:
            layer: last layer whose input stream is included; None and -1 for all.
            incl_mid: include the streams after attention of each layer.
            pos_slice: positions; choose few, since d_vocab is large.
            return_labels: give (logits, labels), with the labels of `accumulated_resid`.

        Raises:
            HookError: values are missing.
            ModelError: there is no model, or it has no head.
        """
        import torch

        check_computes(self, "logit_lens")
        model = needed_model(self, "logit_lens")
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
        """The directions of tokens in a shape that can be multiplied with a stack [part, ..., d_model]."""
        model = needed_model(self, "logit_attrs")
        ids = token_ids(model, tokens)
        rows = stack.shape[1:-1]
        if ids.ndim and ids.shape not in (rows, rows[:1]):
            raise HookError(
                f"tokens have shape {list(ids.shape)} and the stack has rows and positions {list(rows)}; give one "
                "token, one for each row, or one for each row and position"
            )
        directions = together(stack, residual_directions(model, ids))[1]
        if ids.ndim == 1:
            directions = directions.reshape(len(ids), *[1] * (len(rows) - 1), -1)
        return directions
