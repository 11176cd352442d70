"""A Hugging Face model with TransformerLens' hooks: run it, keep the values of hooks, and change them on the way."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack

from actstore.errors import HookError
from actstore.hooks.cache.activation_cache import ActivationCache
from actstore.hooks.cache.caching_hooks import backward
from actstore.hooks.cache.directions import residual_directions
from actstore.hooks.cache.position import PositionSlice, at_positions, keeping_axis
from actstore.hooks.capture.functions import HookPairs, NameFilter, selected
from actstore.hooks.capture.keeping import Keeping, in_forward_order
from actstore.hooks.families.recognition import architecture
from actstore.hooks.generation.generating import GeneratingModel
from actstore.hooks.loading.adapters import check_inside
from actstore.hooks.loading.device import usable_device
from actstore.hooks.loading.pretrained import load_config, load_model, load_tokenizer
from actstore.hooks.loading.transformer_lens_options import TransformerLensOptions, in_own_words
from actstore.hooks.loss import ReturnType
from actstore.hooks.model_checks.self_check import self_check
from actstore.hooks.naming.hook_points import is_read_only, point_of, position_axis
from actstore.hooks.text.prompts import PaddingSide

if TYPE_CHECKING:
    from pathlib import Path

    import torch


class HookedModel(GeneratingModel):
    """Runs an unmodified Hugging Face model, with its own attention kernels and bit-equal values.

    Gradients are off unless a call asks for them. PyTorch hooks are on the model only while a method runs. While there
    are functions on hooks, a direct call of the Hugging Face model is an error, since it would skip them.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, prepend_bos: bool | None = None, check: bool = True
    ) -> None:
        """Wrap a model that is already loaded. It is not changed, and must be in evaluation mode.

        Args:
            model: a causal language model of transformers, or a base model without a head; also with adapters of
                modules such as LoRA, or in a PeftModel with such, quantised, or offloaded by accelerate.
            tokenizer: tokenizer for methods that take text; or the reason why there is none, as text.
            prepend_bos: whether text begins with the BOS token by default; None for yes, if there is one.
            check: run one forward over 8 tokens, and check identities that must hold between hook values.

        Raises:
            ModelError: the family of the model is not known, or it fails the check.
        """
        super().__init__(model, tokenizer, prepend_bos=prepend_bos)
        if check:
            self_check(self)
            if self._inner is not model:
                check_inside(model, self._inner, self.device)

    @classmethod
    def from_pretrained(
        cls,
        name: "str | Path",
        *,
        dtype: "str | torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        prepend_bos: bool | None = None,
        attention: str | None = None,
        n_layers: int | None = None,
        has_head: bool = True,
        **options: Unpack[TransformerLensOptions],
    ) -> Self:
        """Load a model by its Hub name or folder, with its tokenizer if it has one.

        Args:
            name: Hub name or folder.
            dtype: ``float32``, ``bfloat16`` or ``float16``; None for the one it was saved in.
            device: where to put it, as torch spells it; None for a GPU if there is one.
            revision: branch, tag or commit on the Hub.
            trust_remote_code: run Python code that comes with the model; only if you trust it.
            prepend_bos: whether text begins with the BOS token by default; None for yes, if there is one.
            attention: implementation, such as ``sdpa`` or ``flash_attention_2``; None for the family's default.
            n_layers: load only the first layers; the weights of the others are never read into memory. Hooks have the
                values of the whole model; logits and loss come from the stream out of the last layer loaded.
            has_head: load the language-model head and the tokenizer, for logits and text.
            options: arguments of TransformerLens' method of this name, such as ``torch_dtype`` and ``tokenizer``;
                ``fold_ln`` and the like may be False.

        The tokenizer that comes with the model pads on the right; set ``model.tokenizer.padding_side`` for the left.
        Parameters require no gradients; call ``model.hf.requires_grad_(True)`` to train the model.

        Raises:
            ModelError: the model is not found, cannot be loaded, is of no known family, or fails the check.
        """
        name = str(name)
        own = {"dtype": dtype, "device": device, "prepend_bos": prepend_bos, "n_layers": n_layers}
        given = in_own_words(options, own)
        if given["dtype"] is not None:
            given["dtype"] = str(given["dtype"]).removeprefix("torch.")
        config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
        model = load_model(
            name,
            config,
            dtype=given["dtype"],
            device=None if given["device"] is None else str(given["device"]),
            revision=revision,
            trust_remote_code=trust_remote_code,
            layers=architecture(config).layers,
            n_layers=given["n_layers"],
            has_head=has_head,
            attention=attention,
        )
        tokenizer = options.get("tokenizer")
        if tokenizer is None and has_head:
            tokenizer = load_tokenizer(name, revision, trust_remote_code=trust_remote_code)
        side = options.get("default_padding_side")
        if side is not None and tokenizer is not None and not isinstance(tokenizer, str):
            tokenizer.padding_side = side
        return cls(model, tokenizer, prepend_bos=given["prepend_bos"])

    @classmethod
    def from_pretrained_no_processing(cls, name: "str | Path", **arguments: Any) -> Self:
        """The same as `from_pretrained`, which never processes weights."""
        return cls.from_pretrained(name, **arguments)

    def __call__(
        self,
        input: "str | Sequence[str] | torch.Tensor",  # noqa: A002 - TransformerLens' name
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
    ) -> Any:
        """Run the model with the functions on its hooks.

        Args:
            input: ids [batch, position] or [position], or text; with ``start_at_layer`` the residual stream
                [batch, position, d_model].
            return_type: ``logits`` [batch, position, d_vocab], ``loss`` (mean cross-entropy of the next token),
                ``both``, or None.
            loss_per_token: return the loss of each token, [batch, position - 1].
            prepend_bos: begin text with the BOS token; None for the default of this model.
            padding_side: side of the padding of shorter texts, which is masked; None for ``tokenizer.padding_side``.
                With ``left``, pad tokens in front of ids are masked as well.
            start_at_layer: start at this layer, whose input stream is given; -1 runs only the last layer, and the
                number of layers only what follows them.
            stop_at_layer: end before this layer and return the residual stream into it; -1 leaves out the last layer.
            tokens: ids [batch, position] for the loss, with ``start_at_layer``.
            attention_mask: [batch, position] for ids that are padded, 0 at padding.
            past_kv_cache: a ``transformers.DynamicCache()``, to which keys and values are added; the input are the
                tokens after those in it. A mask covers both; without one, padding there stays padding.
            grad: record a graph for gradients with respect to hook values. Without it, the forward runs under
                ``torch.no_grad``, whatever surrounds the call, unless functions on hooks wait for gradients.
        """
        call = self._asked(
            input,
            return_type,
            loss_per_token,
            prepend_bos,
            padding_side,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
            tokens=tokens,
            attention_mask=attention_mask,
            past_kv_cache=past_kv_cache,
            grad=grad,
        )
        visitor = Keeping(self._functions, keep_graph=call.has_graph)
        return call.run(self._forward, visitor)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """A call of the model, under the name that it has in a module of PyTorch."""
        return self(*arguments, **keywords)

    def run_with_cache(
        self,
        input: "str | Sequence[str] | torch.Tensor",  # noqa: A002 - TransformerLens' name
        *arguments: Any,
        names_filter: NameFilter | None = None,
        device: "str | torch.device | None" = None,
        remove_batch_dim: bool = False,
        pos_slice: PositionSlice = None,
        incl_bwd: bool = False,
        return_cache_object: bool = True,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **keywords: Any,
    ) -> tuple[Any, ActivationCache]:
        """Run the model and keep the values of its hooks.

        With ``return_type=None`` and few hooks the forward ends as soon as the last one has its value.

        Args:
            input: ids or text, or the residual stream, as in `__call__`.
            arguments: those of `__call__` after the input.
            names_filter: a name, names, globs, or a function of the name; None for all hooks.
            device: device that values are copied to; None for the device of the model.
            remove_batch_dim: keep values of a single row without their batch axis.
            pos_slice: positions to keep: an integer, a list, or a (start, stop) pair. Their axis stays, with size 1 for
                an integer, as in TransformerLens; methods of the cache drop it.
            incl_bwd: call ``backward()`` on the output, which must be one number, and keep gradients with respect to
                the values as well, under ``blocks.0.hook_resid_pre_grad`` and so on.
            return_cache_object: give an `ActivationCache`; otherwise a dictionary by canonical name.
            reset_hooks_end: only True; nothing of this method stays on the model.
            clear_contexts: forget what functions have kept in ``hook.ctx``.
            keywords: those of `__call__`.

        Returns:
            (output, cache)

        Raises:
            HookError: a name matches nothing.
        """
        call = self._asked(input, *arguments, has_graph=incl_bwd, **keywords)
        grad = keywords.get("grad", False)
        if not reset_hooks_end:
            raise HookError(
                "the cache of run_with_cache is filled by its own run; for later runs, give the hooks of "
                "get_caching_hooks to model.hooks(..., reset_hooks_end=False)"
            )
        if grad and (pos_slice is not None or device is not None or remove_batch_dim or incl_bwd):
            raise HookError(
                "grad=True keeps whole values where they are, for any gradient; leave out pos_slice, device and "
                "remove_batch_dim, or incl_bwd, and choose after"
            )
        if device is not None:
            device = usable_device(device)
        pos_slice = keeping_axis(pos_slice, call.ids.shape[1])
        if remove_batch_dim and len(call.ids) != 1:
            raise HookError(f"remove_batch_dim needs one row, and there are {len(call.ids)}")
        wanted = selected(self.names, "*" if names_filter is None else names_filter, is_exact=grad)
        if grad and (names_filter is None or callable(names_filter)):
            wanted = tuple(name for name in wanted if not is_read_only(name))
        wanted = call.reached(self.names, wanted, names_filter)

        def copy(name: str, value: "torch.Tensor") -> "torch.Tensor":
            value = at_positions(value, pos_slice, axis=position_axis(name))
            if device is not None:
                return value.to(device, copy=True)
            point = point_of(name)  # None for hooks of SAEs
            is_own = point is not None and point.is_computed and pos_slice is None
            return value if is_own else value.clone()

        visitor = Keeping(self._functions, wanted, copy=copy, keep_graph=call.has_graph)
        result = call.run(self._forward, visitor)
        self._check_reached(set(wanted) - visitor.values.keys())
        values = in_forward_order(visitor.values, self.names)
        if call.has_graph and not grad:
            gradients = backward(result, values) if incl_bwd else {}
            values = {name: copy(name, value.detach()) for name, value in values.items()}
            values |= {f"{name}_grad": copy(name, gradient) for name, gradient in gradients.items()}
        cache = ActivationCache(values, self, kind="activations", edited=self._functions.names)
        if clear_contexts:
            self.clear_contexts()
        cache = cache.remove_batch_dim() if remove_batch_dim else cache
        plain: Any = dict(cache.cache_dict)
        return result, cache if return_cache_object else plain

    def run_with_hooks(
        self,
        input: "str | Sequence[str] | torch.Tensor",  # noqa: A002 - TransformerLens' name
        *arguments: Any,
        fwd_hooks: HookPairs = (),
        bwd_hooks: HookPairs = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **keywords: Any,
    ) -> Any:
        """Run the model with functions on its hooks, for this one call.

        Args:
            input: ids or text, or the residual stream, as in `__call__`.
            arguments: those of `__call__` after the input.
            fwd_hooks: pairs of names and functions. A function is called as ``function(value, hook=point)`` and returns
                a new value, or None to keep the value, which it may have edited in place.
            bwd_hooks: the same for gradients with respect to the values; see `hooks`.
            reset_hooks_end: remove the functions at the end.
            clear_contexts: forget what they have kept in ``hook.ctx`` then.
            keywords: those of `__call__`.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(input, *arguments, **keywords)

    def tokens_to_residual_directions(self, tokens: "str | int | torch.Tensor") -> "torch.Tensor":
        """The columns ``W_U[:, token]`` of tokens: [d_model] for one token, else with the axes of the tokens in front.

        The logit of a token is the product of its column with the final stream after its norm. `apply_ln_to_stack`
        gives parts of that stream with the gain of the norm, as the raw W_U needs them; ``folded_b_U`` is the rest.

        Args:
            tokens: one token, as text or id; or ids [batch] or [batch, position].

        Raises:
            ModelError: the model was loaded without its head.
            TokensError: a text is not one token, or an id is not of this model.
        """
        directions = residual_directions(self, tokens)
        # One token gives a vector, as in TransformerLens.
        return directions if directions.numel() > self.cfg.d_model else directions.flatten()
