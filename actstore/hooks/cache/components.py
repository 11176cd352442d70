"""Taking the residual stream apart by heads and neurons."""

from typing import TYPE_CHECKING, Any

from actstore.errors import HookError
from actstore.hooks.cache.cached_values import check_computes, needed_model, require
from actstore.hooks.cache.decomposition import Decomposition
from actstore.hooks.cache.derived import head_results, together
from actstore.hooks.cache.position import PositionSlice, at_positions, indices, is_one
from actstore.hooks.cache.projection import check_directions, projected
from actstore.hooks.naming.names import join

if TYPE_CHECKING:
    import torch

    from actstore.hooks.weights.model_weights import Weights


class Components(Decomposition):
    """Stacks of what heads and neurons add to the residual stream, with the arguments of `Decomposition`."""

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
            layer: see `Decomposition`.
            return_labels: see `Decomposition`.
            incl_remainder: add a part ``remainder``, which is the stream minus all heads.
            pos_slice: see `Decomposition`.
            apply_ln: see `apply_ln_to_stack`.
            fold_value_biases: leave ``(ln1.b @ W_V + b_V) @ W_O`` out of each head, and so in the remainder.

        Raises:
            HookError: values are missing, or heads of this model do not write to the stream.
            ModelError: there is no model.
        """
        end = self._end(layer)
        weights = self._writing("stack_head_results", "heads")
        for computed, option in (
            (incl_remainder, "incl_remainder"),
            (fold_value_biases, "fold_value_biases"),
        ):
            if computed:
                check_computes(self, f"stack_head_results with {option}")
        names = [join(index, "attn.hook_result") for index in range(end)]
        require(self, "stack_head_results", [*names, *self._others(end, incl_remainder, apply_ln)])
        parts = [self._heads(weights, index, pos_slice, fold_value_biases) for index in range(end)]
        labels = [f"L{index}H{head}" for index in range(end) for head in range(self.cfg.n_heads)]
        return self._finish(parts, labels, end, incl_remainder, pos_slice, apply_ln, return_labels)

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
            pos_slice: see `Decomposition`.
            project_output_onto: a direction [d_model] or several [d_model, n], with which each result is multiplied:
                [batch, position, neuron] or [batch, position, neuron, n]. This takes little memory.

        Raises:
            HookError: values are missing, or neurons of this layer do not write to the stream.
            ModelError: there is no model.
        """
        return self._neurons(layer, neuron_slice, pos_slice, project_output_onto)

    def _neurons(
        self,
        layer: int,
        neuron_slice: PositionSlice,
        pos_slice: PositionSlice,
        onto: "torch.Tensor | None",
        norm: tuple[int, bool] | None = None,
    ) -> "torch.Tensor":
        """`get_neuron_results`, through the norm before (layer, mlp_input) if given, which needs directions."""
        check_directions(onto, self.cfg.d_model)
        check_computes(self, "get_neuron_results")
        name = self.names.one(("post", layer))
        weights = self._writing("get_neuron_results", "neurons")
        require(self, "get_neuron_results", [name])
        post = at_positions(self[name], pos_slice, axis=-2)
        index = int(name.split(".")[1])
        post, weight = together(post, weights.blocks[index].mlp.W_out)
        if neuron_slice is not None:
            chosen = indices(neuron_slice, weight.shape[0], "neuron")
            post, weight = post[..., chosen], weight[chosen]
        scale: torch.Tensor | None = None
        if norm is not None:
            # A norm with the scale of the whole stream is linear: its centring and gain act on the weights.
            scale = at_positions(self[self._scale(*norm)], pos_slice, axis=-2).to(post)
            weight = self._centred(weight.float()) * self._gain(*norm, weight)
        weight = projected(weight, onto).to(post.dtype)
        results = post * weight if weight.ndim == 1 else post[..., None] * weight
        if scale is not None:
            results = results / (scale if weight.ndim == 1 else scale[..., None])
        return results.select(post.ndim - 1, 0) if is_one(neuron_slice) else results

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
            layer: see `Decomposition`.
            pos_slice: see `Decomposition`.
            neuron_slice: neurons of each layer.
            return_labels: see `Decomposition`.
            incl_remainder: add a part ``remainder``, which is the stream minus all these neurons.
            apply_ln: see `apply_ln_to_stack`.
            project_output_onto: see `get_neuron_results`; applied after the norm.

        Raises:
            HookError: values are missing, or neurons of this model do not write to the stream.
            ModelError: there is no model.
        """
        end = self._end(layer)
        weights = self._writing("stack_neuron_results", "neurons")
        names = [self.names.one(join(index, "mlp.hook_post")) for index in range(end)]
        require(self, "stack_neuron_results", [*names, *self._others(end, incl_remainder, apply_ln)])
        onto = project_output_onto
        norm = (end, False) if apply_ln and onto is not None else None
        parts, labels = [], []
        for index in range(end):
            chosen = indices(neuron_slice, weights.blocks[index].mlp.W_out.shape[0], "neuron")
            parts.append(_first(self._neurons(index, chosen, pos_slice, onto, norm), onto))
            labels += [f"L{index}N{neuron}" for neuron in chosen]
        return self._finish(parts, labels, end, incl_remainder, pos_slice, apply_ln, return_labels, onto)

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
            layer: see `Decomposition`.
            mlp_input: see `Decomposition`.
            expand_neurons: a part for each neuron; otherwise ``0_mlp_out``, ..., which include the biases of the MLPs.
            apply_ln: see `apply_ln_to_stack`.
            pos_slice: see `Decomposition`.
            return_labels: see `Decomposition`.
            project_output_onto: see `get_neuron_results`; applied after the norm.
            fold_value_biases: put biases of values into ``bias`` and not into heads; see `stack_head_results`.

        Raises:
            HookError: values are missing, or heads or neurons of this model do not write to the stream.
            ModelError: there is no model.
        """
        import torch

        what = "get_full_resid_decomposition"
        check_computes(self, what)
        end = self._end(layer, mlp_input)
        weights = self._writing(what, "heads")
        embeddings = self._embeddings()
        mlp = "mlp.hook_post" if expand_neurons else "hook_mlp_out"
        mlps = [self.names.one(join(index, mlp)) for index in range(end)]
        heads = [join(index, "attn.hook_result") for index in range(end + mlp_input)]
        scales = [self._scale(end, mlp_input)] if apply_ln else []
        require(self, what, [*heads, *mlps, *(name for _, name in embeddings), *scales])
        onto, norm = project_output_onto, (end, mlp_input) if apply_ln else None
        check_directions(onto, self.cfg.d_model)
        parts, labels = [], []
        for index in range(end + mlp_input):
            parts.append(self._heads(weights, index, pos_slice, fold_value_biases))
            labels += [f"L{index}H{head}" for head in range(self.cfg.n_heads)]
        neurons: list[torch.Tensor] = []
        if end and expand_neurons:
            for index in range(end):
                results = self._neurons(index, None, pos_slice, onto, norm if onto is not None else None)
                neurons.append(_first(results, onto))
                labels += [f"L{index}N{neuron}" for neuron in range(len(neurons[-1]))]
        elif end:
            parts.append(self._stack(what, mlps, pos_slice))
            labels += [f"{index}_mlp_out" for index in range(end)]
        n_before = len(parts) - (not expand_neurons and end > 0)
        parts.append(self._stack(what, [name for _, name in embeddings], pos_slice))
        labels += [label for label, _ in embeddings]
        bias = weights.accumulated_bias(
            end, mlp_input, include_mlp_biases=expand_neurons, fold_value_biases=fold_value_biases
        )
        parts.append(bias.detach().to(parts[-1]).expand_as(parts[-1][:1]))
        if onto is not None:
            parts = [self._onto(part, norm, pos_slice, onto) for part in parts]
        stack = torch.cat([*parts[:n_before], *neurons, *parts[n_before:]])
        if norm is not None and onto is None:
            stack = self.apply_ln_to_stack(stack, *norm, pos_slice)
        return (stack, [*labels, "bias"]) if return_labels else stack

    def _onto(
        self,
        stack: "torch.Tensor",
        norm: tuple[int, bool] | None,
        pos_slice: PositionSlice,
        onto: "torch.Tensor",
    ) -> "torch.Tensor":
        """Parts of the stream after the norm before (layer, mlp_input) if given, as products with directions."""
        if norm is not None:
            stack = self.apply_ln_to_stack(stack, *norm, pos_slice)
        return projected(stack, onto)

    def _writing(self, what: str, parts: str) -> "Weights":
        """The weights of a model whose heads and neurons write to the residual stream.

        Raises:
            HookError: a norm comes between them and the stream.
            ModelError: there is no model.
        """
        model = needed_model(self, what)
        if model.architecture.ln1_post is not None:
            raise HookError(
                f"{what} is not offered for {self.cfg.model_type}: its {parts} do not write to the residual stream "
                "themselves, a norm acts on their sum before it is added; use decompose_resid"
            )
        return model.weights

    def _heads(
        self, weights: "Weights", layer: int, pos_slice: PositionSlice, fold_value_biases: bool
    ) -> "torch.Tensor":
        """What each head of a layer adds to the stream [head, ..., d_model]."""
        name = join(layer, "attn.hook_result")
        if name in self.cache_dict:
            results = at_positions(self.cache_dict[name], pos_slice, axis=-3)
        else:
            z = at_positions(self[join(layer, "attn.hook_z")], pos_slice, axis=-3)
            results = head_results(z, weights.blocks[layer].attn.W_O)
        if fold_value_biases:
            results, biases = together(results, weights.blocks[layer].attn.written_biases)
            results = results - biases
        return results.movedim(-2, 0)

    def _others(self, end: int, incl_remainder: bool, apply_ln: bool) -> list[str]:
        """Names of the values that `_finish` needs."""
        has_stream = incl_remainder or end == 0
        return [_into(end)] * has_stream + ([self._scale(end, False)] if apply_ln else [])

    def _finish(
        self,
        parts: "list[torch.Tensor]",
        labels: list[str],
        end: int,
        incl_remainder: bool,
        pos_slice: PositionSlice,
        apply_ln: bool,
        return_labels: bool,
        onto: "torch.Tensor | None" = None,
    ) -> Any:
        import torch

        if incl_remainder or not parts:
            whole = at_positions(self[_into(end)], pos_slice, axis=-2)[None]
            if onto is not None:
                whole = self._onto(whole, (end, False) if apply_ln else None, pos_slice, onto)
            # Before layer 0 there are no parts: the stack is empty, or all of it is the remainder.
            parts = parts or [whole[:0]]
            if incl_remainder:
                sums = torch.stack([part.sum(0) for part in parts]).sum(0)
                parts, labels = [*parts, whole - sums], [*labels, "remainder"]
        stack = torch.cat(parts)
        if apply_ln and onto is None:
            stack = self.apply_ln_to_stack(stack, end, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack


def _first(results: "torch.Tensor", onto: "torch.Tensor | None") -> "torch.Tensor":
    """Results with the axis of neurons in front: it is the last but one, or the last of products with one direction."""
    return results.movedim(-1 if onto is not None and onto.ndim == 1 else -2, 0)


def _into(layer: int) -> str:
    """The name of the residual stream into a layer, or into the unembedding."""
    return join(layer - 1, "hook_resid_post") if layer else join(0, "hook_resid_pre")
