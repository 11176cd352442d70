"""Taking the residual stream apart by heads and neurons."""

from typing import TYPE_CHECKING, Any

from actstore.errors import HookError
from actstore.hooks.cache.decomposition import Decomposition
from actstore.hooks.cache.derived import head_results, together
from actstore.hooks.cache.position import PositionSlice, at_positions, indices, is_one
from actstore.hooks.naming.names import join

if TYPE_CHECKING:
    import torch

    from actstore.hooks.weights.model_weights import Weights


class Components(Decomposition):
    """Stacks of what heads and neurons add to the residual stream, with the arguments of `Decomposition`."""

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
                self._check_computes(f"stack_head_results with {option}")
        names = [join(index, "attn.hook_result") for index in range(end)]
        self._require("stack_head_results", [*names, *self._others(end, incl_remainder, apply_ln)])
        parts = [self._heads(weights, index, pos_slice, fold_value_biases) for index in range(end)]
        labels = [f"L{index}H{head}" for index in range(end) for head in range(self.cfg.n_heads)]
        return self._finish(parts, labels, end, incl_remainder, pos_slice, apply_ln, return_labels)

    def get_neuron_results(
        self, layer: int, neuron_slice: PositionSlice = None, pos_slice: PositionSlice = None
    ) -> "torch.Tensor":
        """What each neuron of a layer adds to the stream [batch, position, neuron, d_model], from mlp.hook_post.

        The bias of the MLP belongs to no neuron.

        Args:
            layer: 0 to the last, or -1 for the last.
            neuron_slice: neurons; an integer removes their axis.
            pos_slice: see `Decomposition`.

        Raises:
            HookError: values are missing, or neurons of this layer do not write to the stream.
            ModelError: there is no model.
        """
        self._check_computes("get_neuron_results")
        name = self.names.one(("post", layer))
        weights = self._writing("get_neuron_results", "neurons")
        self._require("get_neuron_results", [name])
        post = at_positions(self[name], pos_slice, axis=-2)
        index = int(name.split(".")[1])
        post, weight = together(post, weights.blocks[index].mlp.W_out)
        if neuron_slice is not None:
            chosen = indices(neuron_slice, weight.shape[0], "neuron")
            post, weight = post[..., chosen], weight[chosen]
        results = post[..., None] * weight
        return results[..., 0, :] if is_one(neuron_slice) else results

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: PositionSlice = None,
        neuron_slice: PositionSlice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
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

        Raises:
            HookError: values are missing, or neurons of this model do not write to the stream.
            ModelError: there is no model.
        """
        end = self._end(layer)
        weights = self._writing("stack_neuron_results", "neurons")
        names = [self.names.one(join(index, "mlp.hook_post")) for index in range(end)]
        self._require("stack_neuron_results", [*names, *self._others(end, incl_remainder, apply_ln)])
        parts, labels = [], []
        for index in range(end):
            chosen = indices(neuron_slice, weights.blocks[index].mlp.W_out.shape[0], "neuron")
            parts.append(self.get_neuron_results(index, chosen, pos_slice).movedim(-2, 0))
            labels += [f"L{index}N{neuron}" for neuron in chosen]
        return self._finish(parts, labels, end, incl_remainder, pos_slice, apply_ln, return_labels)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: PositionSlice = None,
        return_labels: bool = False,
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
            fold_value_biases: put biases of values into ``bias`` and not into heads; see `stack_head_results`.

        Raises:
            HookError: values are missing, or heads or neurons of this model do not write to the stream.
            ModelError: there is no model.
        """
        import torch

        what = "get_full_resid_decomposition"
        self._check_computes(what)
        end = self._end(layer, mlp_input)
        weights = self._writing(what, "heads")
        embeddings = self._embeddings()
        mlp = "mlp.hook_post" if expand_neurons else "hook_mlp_out"
        mlps = [self.names.one(join(index, mlp)) for index in range(end)]
        heads = [join(index, "attn.hook_result") for index in range(end + mlp_input)]
        scales = [self._scale(end, mlp_input)] if apply_ln else []
        self._require(what, [*heads, *mlps, *(name for _, name in embeddings), *scales])
        parts, labels = [], []
        for index in range(end + mlp_input):
            parts.append(self._heads(weights, index, pos_slice, fold_value_biases))
            labels += [f"L{index}H{head}" for head in range(self.cfg.n_heads)]
        if end and expand_neurons:
            neurons, names = self.stack_neuron_results(end, pos_slice, return_labels=True)
            parts.append(neurons)
            labels += names
        elif end:
            parts.append(self._stack(what, mlps, pos_slice))
            labels += [f"{index}_mlp_out" for index in range(end)]
        parts.append(self._stack(what, [name for _, name in embeddings], pos_slice))
        labels += [label for label, _ in embeddings]
        bias = weights.accumulated_bias(
            end, mlp_input, include_mlp_biases=expand_neurons, fold_value_biases=fold_value_biases
        )
        parts.append(bias.detach().to(parts[-1]).expand_as(parts[-1][:1]))
        stack = torch.cat(parts)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice)
        return (stack, [*labels, "bias"]) if return_labels else stack

    def _writing(self, what: str, parts: str) -> "Weights":
        """The weights of a model whose heads and neurons write to the residual stream.

        Raises:
            HookError: a norm comes between them and the stream.
            ModelError: there is no model.
        """
        model = self._model(what)
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
    ) -> Any:
        import torch

        if incl_remainder or not parts:
            whole = at_positions(self[_into(end)], pos_slice, axis=-2)[None]
            # Before layer 0 there are no parts: the stack is empty, or all of it is the remainder.
            parts = parts or [whole[:0]]
            if incl_remainder:
                sums = torch.stack([part.sum(0) for part in parts]).sum(0)
                parts, labels = [*parts, whole - sums], [*labels, "remainder"]
        stack = torch.cat(parts)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack


def _into(layer: int) -> str:
    """The name of the residual stream into a layer, or into the unembedding."""
    return join(layer - 1, "hook_resid_post") if layer else join(0, "hook_resid_pre")
