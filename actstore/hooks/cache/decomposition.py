"""Taking the residual stream apart by layers, and by what attention and MLP add to it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from actstore.errors import HookError
from actstore.hooks.cache.cached_values import CachedValues, check_computes, needed_model, require
from actstore.hooks.cache.derived import together
from actstore.hooks.cache.position import PositionSlice, at_positions
from actstore.hooks.naming.names import join
from actstore.hooks.weights.used_weights import placed_for

if TYPE_CHECKING:
    import torch

Mode = Literal["all", "mlp", "attn"]


class Decomposition(CachedValues):
    """Stacks of parts of the residual stream [part, batch, position, d_model].

    In all methods ``layer`` is the layer whose input is taken apart, from 0 to the number of layers; that number, None
    and -1 stand for the unembedding. With ``mlp_input`` it is the input of the MLP of that layer, not of its attention.
    ``pos_slice`` chooses positions, and an integer removes their axis; leave it out if the cache was made with one.
    With ``return_labels`` the result is (stack, labels).
    """

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: PositionSlice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream into each layer up to this one. Labels are ``0_pre``, (``0_mid``,) ..., ``final_post``.

        Args:
            layer: see the class.
            incl_mid: include the streams between attention and MLP.
            apply_ln: apply a norm to the streams. For the unembedding, each goes through the final norm with its own
                scale, gain and bias; otherwise the norm is that of `apply_ln_to_stack`.
            pos_slice: see the class.
            mlp_input: see the class.
            return_labels: see the class.

        Raises:
            HookError: values are missing, or the model has no stream between attention and MLP.
            ModelError: the final norm is needed, and there is no model.
        """
        end = self._end(layer, mlp_input)
        parts: list[tuple[str, str]] = []
        for index in range(min(end + 1, self.cfg.n_layers)):
            parts.append((f"{index}_pre", join(index, "hook_resid_pre")))
            if (incl_mid and index < end) or (mlp_input and index == end):
                parts.append((f"{index}_mid", self.names.one(join(index, "hook_resid_mid"))))
        if end == self.cfg.n_layers:
            parts.append(("final_post", join(end - 1, "hook_resid_post")))
        names = [name for _, name in parts]
        is_final = end == self.cfg.n_layers
        norm = (end, mlp_input) if apply_ln and not is_final else None
        stack = self._stack("accumulated_resid", names, pos_slice, norm)
        if apply_ln and is_final:
            check_computes(self, "accumulated_resid with apply_ln")
            stack = self._final_norm("accumulated_resid with apply_ln", stack)
        return (stack, [label for label, _ in parts]) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Mode = "all",
        apply_ln: bool = False,
        pos_slice: PositionSlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What was added to the stream before a layer. Labels are ``embed``, ``pos_embed``, ``0_attn_out``, ...

        Args:
            layer: see the class.
            mlp_input: see the class.
            mode: ``attn`` leaves out what MLPs add, ``mlp`` what attention adds.
            apply_ln: see `apply_ln_to_stack`.
            pos_slice: see the class.
            incl_embeds: include the embeddings. Without them, the parts do not add up to the stream.
            return_labels: see the class.

        Raises:
            HookError: values are missing.
        """
        if mode not in ("all", "mlp", "attn"):
            raise HookError(f"mode is {mode!r}; choose 'all', 'mlp' or 'attn'")
        end = self._end(layer, mlp_input)
        parts = self._embeddings() if incl_embeds else []
        for index in range(end):
            for what in ("attn", "mlp"):
                if mode in ("all", what):
                    parts.append((f"{index}_{what}_out", self.names.one(join(index, f"hook_{what}_out"))))
        if mlp_input and mode != "mlp":
            parts.append((f"{end}_attn_out", join(end, "hook_attn_out")))
        if not parts:
            raise HookError("nothing has been added to the residual stream before layer 0 but the embeddings")
        names = [name for _, name in parts]
        norm = (end, mlp_input) if apply_ln else None
        stack = self._stack("decompose_resid", names, pos_slice, norm)
        return (stack, [label for label, _ in parts]) if return_labels else stack

    def apply_ln_to_stack(
        self,
        residual_stack: "torch.Tensor",
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: PositionSlice = None,
        batch_slice: PositionSlice = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> "torch.Tensor":
        """Parts of a stream after the norm before a layer, applied so that they still add up.

        They are centred if the norm is a LayerNorm, divided by the hook_scale of the whole stream, and multiplied by
        the gain of the norm. So they go with the weights of the model as they are: ``W_U`` after the final norm,
        ``W_Q[layer]`` and so on before. Their sum lacks only the bias of the norm. TransformerLens leaves the gain out
        here, and has it in its weights instead, if it has folded them.

        Args:
            residual_stack: [part, batch, position, d_model] at the chosen positions; or one part without its axis.
            layer: see the class.
            mlp_input: apply the norm before the MLP.
            pos_slice: positions of the stack.
            batch_slice: rows to choose from the stack.
            has_batch_dim: whether the stack has a batch axis.
            recompute_ln: before the unembedding, put each part through the final norm by itself, with its own scale,
                gain and bias, as for a logit lens. The parts do not add up then. Before a layer it has no effect.

        Raises:
            HookError: hook_scale is missing, and so is the stream from which it follows; or the stack has other rows or
                positions; or the values may not be activations.
            ModelError: there is no model.
        """
        check_computes(self, "apply_ln_to_stack")
        end = self._end(layer)
        if recompute_ln and end == self.cfg.n_layers:
            if has_batch_dim:
                residual_stack = at_positions(residual_stack, batch_slice, axis=1, noun="row")
            return self._final_norm("apply_ln_to_stack", residual_stack)
        scale = at_positions(self[self._scale(end, mlp_input)], pos_slice, axis=-2)
        if batch_slice is not None:
            if has_batch_dim:
                axis = 0 if residual_stack.shape[:-1] == scale.shape[:-1] else 1
                residual_stack = at_positions(residual_stack, batch_slice, axis=axis, noun="row")
            if self.has_batch_dim:
                scale = at_positions(scale, batch_slice, axis=0, noun="row")
        is_part = residual_stack.shape[:-1] == scale.shape[:-1]
        rows, scales = residual_stack.shape[0 if is_part else 1 : -1], scale.shape[:-1]
        fits = rows == scales or (self.has_batch_dim and scales[:1] == (1,) and rows == scales[1:])
        if not fits and (self.has_batch_dim or rows[1:] != scales):
            raise HookError(
                f"the stack has shape {tuple(residual_stack.shape)} and the scale of its norm {tuple(scale.shape)}; "
                "give the pos_slice and the batch_slice here with which the stack was made"
            )
        residual_stack = self._centred(residual_stack)
        factor = self._gain(end, mlp_input, residual_stack) / scale.to(residual_stack.device).float()
        return residual_stack * factor.to(residual_stack.dtype)

    def _centred(self, stream: "torch.Tensor") -> "torch.Tensor":
        """Streams minus their mean if norms of this model are LayerNorms."""
        if self.cfg.normalization_type == "LN":
            return stream - stream.mean(-1, keepdim=True)
        return stream

    def _gain(self, end: int, mlp_input: bool, stack: "torch.Tensor") -> "torch.Tensor":
        """The gain of the norm, float32 [d_model]."""
        weights = needed_model(self, "apply_ln_to_stack, which applies the gain of a norm,").weights
        if end == self.cfg.n_layers:
            norm = weights.ln_final
        else:
            norm = weights.blocks[end].ln2 if mlp_input else weights.blocks[end].ln1
        return together(stack, norm.w)[1].float()

    def _end(self, layer: int | None, mlp_input: bool = False) -> int:
        """The number of a layer, which is the number of layers for the unembedding.

        Raises:
            HookError: there is no such layer, or its MLP has no stream of its own.
        """
        n_layers = self.cfg.n_layers
        end = n_layers if layer is None or layer == -1 else layer
        if not 0 <= end <= n_layers:
            raise HookError(
                f"layer is {layer}; give 0 to {n_layers}, which (as None or -1) is the unembedding"
            )
        if mlp_input and end == n_layers:
            raise HookError(f"mlp_input needs the layer of an MLP, 0 to {n_layers - 1}; layer is {layer}")
        if mlp_input:
            self.names.one(join(end, "hook_resid_mid"))
        return end

    def _scale(self, end: int, mlp_input: bool) -> str:
        """The hook of the scale of the norm before a layer, its MLP, or the unembedding."""
        norm = "ln_final" if end == self.cfg.n_layers else f"blocks.{end}.ln{2 if mlp_input else 1}"
        return self.names.one(f"{norm}.hook_scale")

    def _embeddings(self) -> list[tuple[str, str]]:
        """(label, hook name) of each embedding that the model has."""
        hooks = [("embed", "hook_embed"), ("pos_embed", "hook_pos_embed")]
        return [(label, name) for label, name in hooks if name in self.names]

    def _stack(
        self,
        what: str,
        names: Sequence[str],
        pos_slice: PositionSlice,
        norm: tuple[int, bool] | None = None,
    ) -> "torch.Tensor":
        """The streams of these hooks in one tensor [name, ...], after the norm before (layer, mlp_input) if given."""
        import torch

        require(self, what, [*names, *([] if norm is None else [self._scale(*norm)])])
        stack = torch.stack([at_positions(self[name], pos_slice, axis=-2) for name in names])
        return stack if norm is None else self.apply_ln_to_stack(stack, *norm, pos_slice)

    def _final_norm(self, what: str, stream: "torch.Tensor") -> "torch.Tensor":
        """The stream after the final norm, as the module of the model computes it."""
        self.names.one("ln_final.hook_normalized")
        model = needed_model(self, what)
        assert model.architecture.ln_final is not None
        return through(model.base.get_submodule(model.architecture.ln_final), stream)


def through(module: Any, value: "torch.Tensor") -> "torch.Tensor":
    """The output of a module of the model for a value, on the device of the value."""
    import torch

    # Parameters of a model that was loaded elsewhere require gradients; the value decides.
    with torch.set_grad_enabled(torch.is_grad_enabled() and value.requires_grad):
        result: torch.Tensor = module(placed_for(module, value))
    return result.to(value.device)
