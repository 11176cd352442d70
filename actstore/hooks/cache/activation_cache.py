"""The activations of one forward, from a live run or from a store, with TransformerLens' methods."""

from typing import TYPE_CHECKING, Any, Literal

from actstore.errors import HookError
from actstore.hooks.cache.cached_values import CachedValues, check_computes, require
from actstore.hooks.cache.full_decomposition import all_parts
from actstore.hooks.cache.gradients import gradients_by_hook
from actstore.hooks.cache.heads import stack_of_heads
from actstore.hooks.cache.logits import logit_attributions, logits_of_streams
from actstore.hooks.cache.neurons import neurons_of_layer, stack_of_neurons
from actstore.hooks.cache.norms import after_final_norm, parts_after_norm
from actstore.hooks.cache.position import PositionSlice, at_positions
from actstore.hooks.cache.stream_names import Place, embedding_hooks, output_hooks, place_before
from actstore.hooks.cache.stream_parts import accumulated_streams, stack_of_hooks
from actstore.hooks.capture.functions import NameFilter
from actstore.hooks.naming.names import HookName, join

if TYPE_CHECKING:
    import torch

Mode = Literal["all", "mlp", "attn"]


class ActivationCache(CachedValues):
    """Hook values [batch, ...]: ``cache["blocks.5.hook_resid_post"]``, ``cache["resid_post", -1]``, ``cache["k6"]``.

    ``cache.kind`` says whether they are activations or gradients; see `gradients`.

    Some methods give stacks of parts of the residual stream [part, batch, position, d_model]. In these, ``layer`` is
    the layer whose input is taken apart, from 0 to the number of layers; that number, None and -1 stand for the
    unembedding. With ``mlp_input`` it is the input of the MLP of that layer, not of its attention. ``pos_slice``
    chooses positions, and an integer removes their axis; leave it out if the cache was made with one. With
    ``return_labels`` the result is (stack, labels).
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
        return ActivationCache(
            gradients_by_hook(self, of, names_filter),
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
        import torch

        n_layers = place_before(self.names, self.cfg, layer).layer
        if n_layers == 0:
            raise HookError("there are no layers before layer 0")
        keys: list[HookName] = [
            (name, index) if sublayer_type is None else (name, index, sublayer_type)
            for index in range(n_layers)
        ]
        names = [self.names.one(key) for key in keys]
        require(self, "stack_activation", names)
        return torch.stack([self[name] for name in names])

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
        place = place_before(self.names, self.cfg, layer, mlp_input)
        stack, labels = accumulated_streams(self, place, incl_mid, apply_ln, pos_slice)
        return (stack, labels) if return_labels else stack

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
        place = place_before(self.names, self.cfg, layer, mlp_input)
        parts = embedding_hooks(self.names) if incl_embeds else []
        parts += output_hooks(self.names, place, attn=mode != "mlp", mlp=mode != "attn")
        if not parts:
            raise HookError("nothing has been added to the residual stream before layer 0 but the embeddings")
        names = [name for _, name in parts]
        stack = stack_of_hooks(self, "decompose_resid", names, pos_slice, place if apply_ln else None)
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
        number = place_before(self.names, self.cfg, layer).layer
        if recompute_ln and number == self.cfg.n_layers:
            if has_batch_dim:
                residual_stack = at_positions(residual_stack, batch_slice, axis=1, noun="row")
            return after_final_norm(self, "apply_ln_to_stack", residual_stack)
        place = Place(number, mlp_input)
        return parts_after_norm(self, residual_stack, place, pos_slice, batch_slice, has_batch_dim)

    def compute_head_results(self) -> None:
        """Put what each head adds to the stream into this cache, as ``attn.hook_result`` of every layer.

        There is no need to: `stack_head_results` computes it when asked for.

        Raises:
            HookError: values are missing, or may not be activations.
            ModelError: there is no model.
        """
        names = [join(layer, "attn.hook_result") for layer in range(self.cfg.n_layers)]
        require(self, "compute_head_results", names)
        self.cache_dict |= {name: self[name] for name in names}

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PositionSlice = None,
        apply_ln: bool = False,
        fold_value_biases: bool = False,
    ) -> Any:
        """What each head before a layer adds to the stream, from attn.hook_z. Labels are ``L0H0``, ``L0H1``, ...

        Biases of the output projection belong to no head. Those of values, and of the norm before them, are in z and so
        in what the head adds, since weights are as the model has them. They add the same at every position, as rows of
        patterns sum to 1. TransformerLens moves them out of the heads if it processes weights, as its
        ``HookedTransformer`` and ``enable_compatibility_mode`` do: ``fold_value_biases=True`` gives what it gives then.

        Args:
            layer: see the class.
            return_labels: see the class.
            incl_remainder: add a part ``remainder``, which is the stream minus all heads.
            pos_slice: see the class.
            apply_ln: see `apply_ln_to_stack`.
            fold_value_biases: leave ``(ln1.b @ W_V + b_V) @ W_O`` out of each head, and so in the remainder.

        Raises:
            HookError: values are missing, or heads of this model do not write to the stream.
            ModelError: there is no model.
        """
        end = place_before(self.names, self.cfg, layer).layer
        stack, labels = stack_of_heads(self, end, incl_remainder, pos_slice, apply_ln, fold_value_biases)
        return (stack, labels) if return_labels else stack

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: PositionSlice = None,
        pos_slice: PositionSlice = None,
        project_output_onto: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """What each neuron of a layer adds to the stream [batch, position, neuron, d_model], from mlp.hook_post.

        The bias of the MLP belongs to no neuron.

        Args:
            layer: 0 to the last, or -1 for the last.
            neuron_slice: neurons; an integer removes their axis.
            pos_slice: see the class.
            project_output_onto: a direction [d_model] or several [d_model, n], with which each result is multiplied:
                [batch, position, neuron] or [batch, position, neuron, n]. This takes little memory.

        Raises:
            HookError: values are missing, or neurons of this layer do not write to the stream.
            ModelError: there is no model.
        """
        return neurons_of_layer(self, layer, neuron_slice, pos_slice, project_output_onto)

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: PositionSlice = None,
        neuron_slice: PositionSlice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: "torch.Tensor | None" = None,
    ) -> Any:
        """What each neuron before a layer adds to the stream. Labels are ``L0N0``, ``L0N1``, ...

        This takes d_mlp times the memory of a residual stream for each layer; choose positions or neurons.

        Args:
            layer: see the class.
            pos_slice: see the class.
            neuron_slice: neurons of each layer.
            return_labels: see the class.
            incl_remainder: add a part ``remainder``, which is the stream minus all these neurons.
            apply_ln: see `apply_ln_to_stack`.
            project_output_onto: see `get_neuron_results`; applied after the norm.

        Raises:
            HookError: values are missing, or neurons of this model do not write to the stream.
            ModelError: there is no model.
        """
        end = place_before(self.names, self.cfg, layer).layer
        onto = project_output_onto
        stack, labels = stack_of_neurons(self, end, pos_slice, neuron_slice, incl_remainder, apply_ln, onto)
        return (stack, labels) if return_labels else stack

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: PositionSlice = None,
        return_labels: bool = False,
        project_output_onto: "torch.Tensor | None" = None,
        fold_value_biases: bool = False,
    ) -> Any:
        """All parts of the stream into a layer: heads, neurons, ``embed``, ``pos_embed``, and ``bias`` for all biases.

        Args:
            layer: see the class.
            mlp_input: see the class.
            expand_neurons: a part for each neuron; otherwise ``0_mlp_out``, ..., which include the biases of the MLPs.
            apply_ln: see `apply_ln_to_stack`.
            pos_slice: see the class.
            return_labels: see the class.
            project_output_onto: see `get_neuron_results`; applied after the norm.
            fold_value_biases: put biases of values into ``bias`` and not into heads; see `stack_head_results`.

        Raises:
            HookError: values are missing, or heads or neurons of this model do not write to the stream.
            ModelError: there is no model.
        """
        check_computes(self, "get_full_resid_decomposition")
        place = place_before(self.names, self.cfg, layer, mlp_input)
        onto = project_output_onto
        stack, labels = all_parts(self, place, expand_neurons, apply_ln, pos_slice, onto, fold_value_biases)
        return (stack, labels) if return_labels else stack

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
        return logit_attributions(
            self, residual_stack, tokens, incorrect_tokens, pos_slice, batch_slice, has_batch_dim
        )

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
        logits, labels = logits_of_streams(self, layer, incl_mid, pos_slice)
        return (logits, labels) if return_labels else logits
