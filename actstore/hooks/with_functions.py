"""The part of a hooked model that has functions on its hooks, and its hooks and parts as attributes."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from actstore.hooks.cache.caching_hooks import caching_hooks
from actstore.hooks.cache.position import PositionSlice
from actstore.hooks.capture.functions import HookFunctions, HookPairs, NameFilter, selected
from actstore.hooks.capture.hook_point import Direction, HookFunction, HookPoint
from actstore.hooks.capture.raw_calls import RawCalls
from actstore.hooks.loading.transformer_lens_options import PROCESSING, check_unprocessed
from actstore.hooks.module_methods import ModuleMethods
from actstore.hooks.naming.hook_points import is_read_only
from actstore.hooks.parts import Part, block, hook_of, leaves_under, outside

if TYPE_CHECKING:
    import torch


class WithFunctions(ModuleMethods):
    """Functions that stay on hooks, with the names and arguments of TransformerLens."""

    def __init__(self, model: Any, tokenizer: Any = None, *, prepend_bos: bool | None = None) -> None:
        """Wrap a model without running it; arguments are those of `actstore.HookedModel`."""
        super().__init__(model, tokenizer, prepend_bos=prepend_bos)
        self._functions = HookFunctions(self.names, RawCalls(self._inner, self.base))

    @contextmanager
    def hooks(
        self,
        fwd_hooks: HookPairs = (),
        bwd_hooks: HookPairs = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """A context with functions on hooks, which are removed at its end, however it ends.

        Functions for gradients get the gradient with respect to the value that the forward goes on with. What they
        return goes further back in its place. Forwards with them record a graph, and call them when gradients are
        computed, even if they have been removed by then.

        Args:
            fwd_hooks: pairs of names and functions of the value.
            bwd_hooks: pairs of names and functions of the gradient.
            reset_hooks_end: otherwise the functions stay until `reset_hooks`.
            clear_contexts: forget what the functions have kept in ``hook.ctx`` when they are removed.
        """
        with self._functions.added(
            fwd_hooks, bwd_hooks, stay=not reset_hooks_end, clear_contexts=clear_contexts
        ):
            yield self

    @property
    def has_functions(self) -> bool:
        """Whether there are functions on hooks, of values or gradients, or SAEs."""
        return bool(self._functions)

    def add_hook(
        self,
        name: NameFilter,
        hook: HookFunction,
        dir: Direction = "fwd",  # noqa: A002 - name of TransformerLens
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a function to hooks until `reset_hooks` is called.

        Args:
            name: a name, names, globs, or a function of the name.
            hook: called as ``function(value, hook=point)``.
            dir: ``fwd`` for a function of values, ``bwd`` for one of gradients.
            is_permanent: whether `reset_hooks` leaves it, unless told otherwise.
            level: a number by which `reset_hooks` can remove it.
            prepend: call it before the functions that are there already.

        Raises:
            HookError: a name matches nothing.
        """
        self._functions.add(
            name, hook, direction=dir, is_permanent=is_permanent, level=level, prepend=prepend
        )

    def add_perma_hook(self, name: NameFilter, hook: HookFunction, dir: Direction = "fwd") -> None:  # noqa: A002
        """Add a function to hooks until ``reset_hooks(including_permanent=True)`` is called."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove functions from all hooks, and what they kept in ``hook.ctx``.

        Args:
            clear_contexts: empty ``hook.ctx`` of all hooks.
            direction: which functions: those of values, of gradients, or both.
            including_permanent: remove all functions, whatever their level.
            level: remove only functions of this level; None for those of any.
        """
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level)

    def get_caching_hooks(
        self,
        names_filter: NameFilter | None = None,
        incl_bwd: bool = False,
        device: "str | torch.device | None" = None,
        remove_batch_dim: bool = False,
        cache: "dict[str, torch.Tensor] | None" = None,
        pos_slice: PositionSlice = None,
    ) -> "tuple[dict[str, torch.Tensor], HookPairs, HookPairs]":
        """Functions that keep values, for `hooks` and `run_with_hooks`.

        Args:
            names_filter: which hooks; None for all.
            incl_bwd: make functions for gradients as well, which keep them under ``blocks.0.hook_resid_pre_grad``.
            device: where values are kept; None for where they are.
            remove_batch_dim: keep values of a single row without their batch axis.
            cache: the dictionary to keep them in; None for a new one.
            pos_slice: positions to keep, as in `run_with_cache`.

        Returns:
            (the dictionary that the functions fill, pairs for values, pairs for gradients)
        """
        names = selected(self.names, "*" if names_filter is None else names_filter)
        cache = {} if cache is None else cache
        options: Any = {"device": device, "remove_batch_dim": remove_batch_dim, "pos_slice": pos_slice}
        fwd = caching_hooks(names, cache, **options)
        graded = [name for name in names if not is_read_only(name)] if incl_bwd else []
        return cache, fwd, caching_hooks(graded, cache, suffix="_grad", **options)

    def add_caching_hooks(self, *arguments: Any, **keywords: Any) -> "dict[str, torch.Tensor]":
        """Add the functions of `get_caching_hooks` until `reset_hooks`, and return the dictionary that they fill."""
        cache, fwd, bwd = self.get_caching_hooks(*arguments, **keywords)
        with self.hooks(fwd, bwd, reset_hooks_end=False):
            return cache

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove functions from all hooks; arguments are those of `reset_hooks`."""
        self._functions.remove(direction=direction, including_permanent=including_permanent, level=level)

    def clear_contexts(self) -> None:
        """Empty ``hook.ctx`` of all hooks."""
        self._functions.clear_contexts()

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """All hooks by canonical name."""
        return {name: self._functions.point(name) for name in self.names}

    def hook_points(self) -> Iterable[HookPoint]:
        """All hooks."""
        return self.hook_dict.values()

    @cached_property
    def blocks(self) -> tuple[Part, ...]:
        """The layers: ``model.blocks[3].attn.hook_z``, ``model.blocks[3].mlp.W_in``, ``model.blocks[3].ln1.w``."""
        return tuple(
            block(self, self._functions, layer, partial(self._run_layer, layer))
            for layer in range(self.cfg.n_layers)
        )

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _run_layer(self, layer: int, stream: "torch.Tensor", **options: Any) -> "torch.Tensor":
        result: torch.Tensor = self(stream, start_at_layer=layer, stop_at_layer=layer + 1, **options)
        return result

    @cached_property
    def _parts(self) -> Mapping[str, Part]:
        return outside(self, self._functions)

    def __getattr__(self, name: str) -> Any:
        # Called only for attributes that are not found otherwise.
        if name.startswith("hook_"):
            return hook_of(self._functions, name)
        if name in _PARTS and name in self._parts:
            return self._parts[name]
        return super().__getattr__(name)

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self._parts, *leaves_under(self.names, "")]

    # Hooks cost nothing until they are named, so there is little to turn on; see `LiveConfig`.

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Taken from TransformerLens; ``attn.hook_result`` is always there, when it is named."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Taken from TransformerLens; ``hook_mlp_in`` is always there, when it is named."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Let functions of names select ``hook_q_input`` and its like, too; by name they are always there."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Let functions of names select ``hook_attn_in``, too; by name it is always there.

        Raises:
            HookError: it is to be True, and heads of the model share keys.
        """
        self.cfg.use_attn_in = use_attn_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Taken from TransformerLens.

        Raises:
            ModelError: it is to be True.
        """
        self.cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention

    def enable_compatibility_mode(
        self, disable_warnings: bool = False, no_processing: bool = False, **processing: bool
    ) -> None:
        """Taken from TransformerLens, for weights that stay as they are (``no_processing=True``).

        Raises:
            ModelError: weights are to be processed.
        """
        del disable_warnings
        check_unprocessed({} if no_processing else dict.fromkeys(PROCESSING, True) | processing)


_PARTS: Final = ("embed", "pos_embed", "unembed", "ln_final")
