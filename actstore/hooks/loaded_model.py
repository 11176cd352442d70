"""A Hugging Face model that is loaded, with TransformerLens' names for its hooks, sizes and weights."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from actstore.errors import ModelError
from actstore.hooks.capture.forward import Forward
from actstore.hooks.capture.visitor import Handing, Sink
from actstore.hooks.families.architectures import Architecture, base_of
from actstore.hooks.families.live_config import LiveConfig
from actstore.hooks.families.model_names import names_of
from actstore.hooks.families.recognition import architecture
from actstore.hooks.loading.live_model import checked, device_of
from actstore.hooks.packing.exactness import check_exact
from actstore.hooks.packing.packed_run import PackedRun, packed_run
from actstore.hooks.text.prompts import PaddingSide, Prompts
from actstore.hooks.text.with_text import WithText
from actstore.hooks.weights.model_weights import Weights

if TYPE_CHECKING:
    import torch
    from torch import nn


class LoadedModel(WithText):
    """A model as checks and caches need it: its parts, its weights, and forwards that only read values."""

    cfg: LiveConfig

    def __init__(self, model: Any, tokenizer: Any = None, *, prepend_bos: bool | None = None) -> None:
        """Wrap a model without running it; arguments are those of `actstore.HookedModel`.

        Raises:
            ModelError: the family of the model is not known, or the model cannot be run as it is.
        """
        self._inner, config = checked(model)
        self.hf = model
        self.base: nn.Module = base_of(self._inner)
        self.architecture: Architecture = architecture(config)
        missing = tokenizer if isinstance(tokenizer, str) else None
        has_text = tokenizer is not None and missing is None
        super().__init__(Prompts(tokenizer, prepend_bos=prepend_bos) if has_text else None, missing)
        self.cfg = replace(
            LiveConfig.of(config, self.architecture),
            n_layers=len(self.base.get_submodule(self.architecture.layers)),
            device=str(self.device),
            dtype=self.dtype,
            default_prepend_bos=None if self._prompts is None else self._prompts.prepend_bos,
        )
        self.names = names_of(self.architecture, self.cfg)
        self.has_head = self.base is not self._inner and self._inner.get_output_embeddings() is not None
        self._forward = Forward(self._inner, self.base, self.architecture, self.cfg)

    def set_tokenizer(self, tokenizer: Any, default_padding_side: PaddingSide | None = None) -> None:
        """Take another tokenizer for methods that take text.

        Args:
            tokenizer: a tokenizer of Hugging Face, with the ids of this model.
            default_padding_side: the side on which it shall pad from now on; None for that which it is set to.

        Text begins with its BOS token if it has one, unless ``cfg.default_prepend_bos`` was set to False before.
        """
        had_choice = self._prompts is not None and self._prompts.tokenizer.bos_token_id is not None
        stays_without = had_choice and self.cfg.default_prepend_bos is False
        self._prompts = Prompts(tokenizer, prepend_bos=False if stays_without else None)
        if default_padding_side is not None:
            tokenizer.padding_side = default_padding_side
        self.cfg.default_prepend_bos = self._prompts.prepend_bos

    @property
    def device(self) -> "torch.device":
        """The device on which the model takes token ids."""
        return device_of(self.base.get_submodule(self.architecture.embed), self.base)

    @property
    def dtype(self) -> "torch.dtype":
        return next(self.base.parameters()).dtype

    @property
    def layers(self) -> Any:
        """The list of layers of the Hugging Face model."""
        return self._forward.layers

    @property
    def attention(self) -> str:
        """The attention implementation in use: ``sdpa``, ``flash_attention_2``, ``eager``, ..."""
        return str(getattr(self.base.config, "_attn_implementation", None) or "eager")

    def run(self, tokens: "torch.Tensor", hooks: Sequence[str], sink: Sink) -> None:
        """Run one forward over full rows of ids [batch, position], and hand values to ``sink``; it ends after the last.

        Extraction uses this: functions on hooks are not called, and nothing is kept.

        Raises:
            ModelError: the forward never reached a hook.
        """
        import torch

        visitor = Handing(hooks, sink)
        with torch.inference_mode():
            self._forward.run(tokens, visitor, hooks, has_logits=False)
        self._check_reached(visitor.waiting)

    @contextmanager
    def packed_run(self, tokens: "torch.Tensor") -> Iterator[PackedRun]:
        """A context with a recorded forward over ids [prompt, position], for variants that share its prefixes.

        Functions on hooks are not called. No other forward of this model can run in the context.

        Raises:
            ModelError: packed rows are not exact for this model.
        """
        with packed_run(self._forward, self.base, self.architecture, self.cfg, tokens) as run:
            check_exact(run, self.base)
            yield run

    @cached_property
    def weights(self) -> Weights:
        """Views of the weights in TransformerLens' shapes; ``model.W_Q`` is ``model.weights.W_Q``, and so on.

        Reading a weight raises ModelError if the forward does not use it alone: with adapters, quantisation or
        offloading.
        """
        # An adapter that is added later puts another module in place of the head.
        head = self.hf.get_output_embeddings if self.has_head else None
        return Weights(self.base, head, self.architecture, self.cfg)

    def __getattr__(self, name: str) -> Any:
        # Called only for attributes that are not found otherwise.
        if name.startswith("_") or not hasattr(Weights, name):
            raise AttributeError(f"a HookedModel has no attribute {name!r}")
        return getattr(self.weights, name)

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *(name for name in dir(Weights) if not name.startswith("_"))]

    def __repr__(self) -> str:
        cfg = self.cfg
        return (
            f"<HookedModel {cfg.model_name}: {cfg.model_type}, {cfg.n_layers} layers, d_model {cfg.d_model}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}, {self.attention} attention>"
        )

    def _check_reached(self, missing: set[str]) -> None:
        if missing:
            raise ModelError(
                f"the forward of this {self.cfg.model_type} model never reached {min(missing)}; its modules are not "
                "where actstore expects them"
            )
