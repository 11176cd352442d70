"""A Hugging Face model with TransformerLens' hooks: run it, keep the values of hooks, and change them on the way."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, Unpack

from actstore.errors import HookError, ModelError, TokensError
from actstore.hooks.cache.activation_cache import ActivationCache
from actstore.hooks.cache.directions import residual_directions
from actstore.hooks.cache.position import PositionSlice, at_positions, indices, is_one
from actstore.hooks.cache.slicing import is_slice_object
from actstore.hooks.capture.functions import Keeping, NameFilter, in_forward_order, selected
from actstore.hooks.capture.hook_point import HookFunction
from actstore.hooks.capture.visitor import Ending
from actstore.hooks.families.recognition import architecture
from actstore.hooks.loading.adapters import check_inside
from actstore.hooks.loading.device import usable_device
from actstore.hooks.loading.pretrained import load_config, load_model, load_tokenizer
from actstore.hooks.loading.transformer_lens_options import TransformerLensOptions, in_own_words
from actstore.hooks.loss import ReturnType, check_has_loss, next_token_loss, output
from actstore.hooks.model_checks.left_padding import has_left_padding, ignores_left_padding
from actstore.hooks.model_checks.self_check import self_check
from actstore.hooks.naming.hook_points import is_read_only, point_of
from actstore.hooks.text.inputs import as_mask
from actstore.hooks.text.prompts import PaddingSide
from actstore.hooks.with_saes import WithSaes

if TYPE_CHECKING:
    from pathlib import Path

    import torch


class HookedModel(WithSaes):
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
        return cls(model, tokenizer, prepend_bos=given["prepend_bos"])

    @classmethod
    def from_pretrained_no_processing(cls, name: "str | Path", **arguments: Any) -> Self:
        """The same as `from_pretrained`, which never processes weights."""
        return cls.from_pretrained(name, **arguments)

    def __call__(
        self,
        tokens: "str | Sequence[str] | torch.Tensor",
        *,
        return_type: ReturnType = "logits",
        stop_at_layer: int | None = None,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = "right",
        attention_mask: "torch.Tensor | None" = None,
        loss_per_token: bool = False,
        grad: bool = False,
    ) -> Any:
        """Run the model with the functions on its hooks.

        Args:
            tokens: ids [batch, position] or [position], or text.
            return_type: ``logits`` [batch, position, d_vocab], ``loss`` (mean cross-entropy of the next token),
                ``both``, or None.
            stop_at_layer: end before this layer and return the residual stream into it; -1 leaves out the last layer.
            prepend_bos: begin text with the BOS token; None for the default of this model.
            padding_side: side on which shorter texts are padded. Padding is masked.
            attention_mask: [batch, position] for ids that are padded, 0 at padding.
            loss_per_token: return the loss of each token, [batch, position - 1].
            grad: record a graph for gradients with respect to hook values. Without it, the forward runs under
                ``torch.no_grad``, whatever surrounds the call.
        """
        ids, mask = self._input(tokens, prepend_bos, padding_side, attention_mask)
        visitor = Keeping(self._functions, (), copy=lambda _name, value: value, keep_graph=grad)
        return self._run(ids, mask, visitor, return_type, stop_at_layer, loss_per_token, grad)

    def run_with_cache(
        self,
        tokens: "str | Sequence[str] | torch.Tensor",
        *,
        names_filter: NameFilter | None = None,
        device: "str | torch.device | None" = None,
        remove_batch_dim: bool = False,
        stop_at_layer: int | None = None,
        pos_slice: PositionSlice = None,
        return_type: ReturnType = "logits",
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = "right",
        attention_mask: "torch.Tensor | None" = None,
        loss_per_token: bool = False,
        grad: bool = False,
    ) -> tuple[Any, ActivationCache]:
        """Run the model and keep the values of its hooks.

        With ``return_type=None`` and few hooks the forward ends as soon as the last one has its value.

        Args:
            names_filter: a name, names, globs, or a function of the name; None for all hooks.
            device: device that values are copied to; None for the device of the model.
            remove_batch_dim: keep values of a single row without their batch axis.
            pos_slice: positions to keep: an integer, a list, or a (start, stop) pair. Their axis stays, with size 1 for
                an integer, as in TransformerLens; methods of the cache drop it.

        For the other arguments see `__call__`.

        Returns:
            (output, cache)

        Raises:
            HookError: a name matches nothing.
        """
        ids, mask = self._input(tokens, prepend_bos, padding_side, attention_mask)
        if grad and (pos_slice is not None or device is not None or remove_batch_dim):
            raise HookError(
                "grad=True keeps whole values where they are; leave out pos_slice, device and remove_batch_dim, and "
                "choose after"
            )
        if device is not None:
            device = usable_device(device)
        if pos_slice is not None:
            positions = indices(pos_slice, ids.shape[1], "position")
            # In TransformerLens, only an integer inside of a Slice removes the axis.
            pos_slice = positions if is_one(pos_slice) and not is_slice_object(pos_slice) else pos_slice
        if remove_batch_dim and len(ids) != 1:
            raise HookError(f"remove_batch_dim needs one row, and there are {len(ids)}")
        wanted = selected(self.names, "*" if names_filter is None else names_filter, is_exact=grad)
        if grad and (names_filter is None or callable(names_filter)):
            wanted = tuple(name for name in wanted if not is_read_only(name))
        if stop_at_layer is not None:
            wanted = self._before(stop_at_layer, wanted, is_default=_is_open(names_filter))

        def copy(name: str, value: "torch.Tensor") -> "torch.Tensor":
            point = point_of(name)  # None for hooks of SAEs, [batch, position, ...]
            value = at_positions(value, pos_slice, axis=1 if point is None else point.position_axis)
            if device is not None:
                return value.to(device, copy=True)
            is_own = point is not None and point.is_computed and pos_slice is None
            return value if is_own else value.clone()

        visitor = Keeping(self._functions, wanted, copy=copy, keep_graph=grad)
        result = self._run(ids, mask, visitor, return_type, stop_at_layer, loss_per_token, grad)
        self._check_reached(set(wanted) - visitor.values.keys())
        cache = ActivationCache(
            in_forward_order(visitor.values, self.names),
            self,
            kind="activations",
            edited=self._functions.names,
        )
        return result, cache.remove_batch_dim() if remove_batch_dim else cache

    def run_with_hooks(
        self,
        tokens: "str | Sequence[str] | torch.Tensor",
        *,
        fwd_hooks: Sequence[tuple[NameFilter, HookFunction]] = (),
        **arguments: Any,
    ) -> Any:
        """Run the model with functions on its hooks, for this one call.

        Args:
            fwd_hooks: pairs of names and functions. A function is called as ``function(value, hook=point)`` and returns
                a new value, or None to keep the value, which it may have edited in place.
            arguments: see `__call__`.
        """
        with self.hooks(fwd_hooks):
            return self(tokens, **arguments)

    def hooks(
        self, fwd_hooks: Sequence[tuple[NameFilter, HookFunction]] = ()
    ) -> AbstractContextManager[None]:
        """A context with functions on hooks, which are removed at its end, however it ends."""
        return self._functions.added(fwd_hooks)

    @property
    def has_functions(self) -> bool:
        """Whether there are functions on hooks."""
        return bool(self._functions.names)

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

    def _run(
        self,
        ids: "torch.Tensor",
        mask: "torch.Tensor | None",
        visitor: Keeping,
        return_type: ReturnType,
        stop_at_layer: int | None,
        loss_per_token: bool,
        grad: bool,
    ) -> Any:
        if return_type not in ("logits", "loss", "both", None):
            raise ModelError(f"return_type is {return_type!r}; choose 'logits', 'loss', 'both' or None")
        stop = None if stop_at_layer is None else self._layer(stop_at_layer)
        has_logits = return_type is not None and stop is None
        if has_logits and not self.has_head:
            raise ModelError("this model was loaded without its head; choose return_type=None")
        if has_logits and return_type != "logits":
            check_has_loss(ids, mask)
        result = self._forward.run(
            ids,
            # Hooks of SAEs are visited with the hooks that they replace.
            visitor
            if has_logits or stop is not None
            else Ending(visitor, visitor.names.intersection(self._names_without_saes)),
            visitor.names,
            mask=mask,
            stop_at_layer=stop,
            has_logits=has_logits,
            has_graph=grad,
        )
        if not has_logits or result is None:
            return result
        return output(result, ids, mask, return_type, per_token=loss_per_token)

    def _layer(self, layer: int) -> int:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise HookError(f"stop_at_layer is {layer!r}; give the number of a layer")
        number = layer + self.cfg.n_layers if layer < 0 else layer
        if not 0 <= number <= self.cfg.n_layers:
            raise HookError(f"stop_at_layer is {layer}; this model has layers 0 to {self.cfg.n_layers - 1}")
        return number

    def _before(self, stop_at_layer: int, wanted: Sequence[str], *, is_default: bool) -> tuple[str, ...]:
        """The hooks among these that a forward reaches before a layer; an error if one of them was named and is not."""
        stop = self._layer(stop_at_layer)
        reached = self.names.before(stop)
        missed = [name for name in wanted if name not in reached]
        if missed and not is_default:
            raise HookError(
                f"{missed[0]} comes after stop_at_layer={stop_at_layer}; stop later, or leave it out"
            )
        return tuple(name for name in wanted if name in reached)


def _is_open(names_filter: NameFilter | None) -> bool:
    """Whether the filter names no hook in particular, so that hooks after the end of the forward may be left out."""
    names = [names_filter] if isinstance(names_filter, str) else names_filter
    return names is None or callable(names) or any(isinstance(name, str) and "*" in name for name in names)
