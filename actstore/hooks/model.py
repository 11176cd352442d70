"""A Hugging Face model with hooks: the unmodified forward, as far as the last hook that is asked for."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

from actstore.errors import ModelError
from actstore.hooks.architecture import Architecture, Site, architecture
from actstore.hooks.names import layer_of, resolve, split

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

Sink = Callable[[str, "torch.Tensor"], None]
"""Takes (hook name, value [batch, position, ...]). The value must be copied before the sink returns."""


class HookedModel:
    """Computes hook values; no language-model head, no KV cache, nothing after the last hook."""

    def __init__(self, base: "nn.Module", config: "PretrainedConfig") -> None:
        """Wrap a base model (one without a head) that is already loaded; the model is not changed."""
        self.base = base
        self.config = config
        self.architecture: Architecture = architecture(config.model_type)
        self._layers: Any = base.get_submodule(self.architecture.layers)

    @classmethod
    def from_pretrained(
        cls, name: str, *, dtype: str, device: str, revision: str | None = None, n_layers: int | None = None
    ) -> Self:
        """Load a model by its Hub name or folder.

        Args:
            name: Hub name or folder.
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            device: where to put it, as torch spells it.
            revision: branch, tag or commit on the Hub.
            n_layers: load only this many layers; the weights of the others are never read into memory.

        Raises:
            ModelError: not found, not loadable, or not of a supported family.
        """
        import torch
        from transformers import AutoModel

        config = load_config(name, revision=revision)
        architecture(config.model_type)
        if n_layers is not None:
            _truncate(config, n_layers)
        with _explaining(name), _quiet_loading():
            base, loaded = AutoModel.from_pretrained(
                name,
                config=config,
                revision=revision,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                output_loading_info=True,
            )
        _check_loaded(name, loaded)
        try:
            base.to(device).eval().requires_grad_(False)
        except (RuntimeError, AssertionError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"model {name!r} cannot be put on device {device!r}: {first}") from error
        return cls(base, config)

    @property
    def attention(self) -> str:
        """The attention implementation in use: ``sdpa``, ``flash_attention_2``, ``eager``, ..."""
        return str(getattr(self.base.config, "_attn_implementation", None) or "eager")

    def run(self, tokens: "torch.Tensor", hooks: Sequence[str], sink: Sink) -> None:
        """One forward over [batch, position] token ids; every hook's value is handed to ``sink`` once.

        Rows are taken as full: positions attend to all earlier positions of their row. Padding on the right needs
        no mask, since no earlier position sees it.
        """
        import torch

        waiting = set(hooks)

        def take(name: str, value: "torch.Tensor") -> None:
            sink(name, value)
            waiting.discard(name)
            if not waiting:
                raise _Finished

        with self._tapped(hooks, take), torch.inference_mode(), contextlib.suppress(_Finished):
            self.base(input_ids=tokens, use_cache=False)
        if waiting:
            raise ModelError(
                f"the forward of this {self.config.model_type} model never reached {sorted(waiting)[0]}; "
                "its modules are not where actstore expects them"
            )

    @contextlib.contextmanager
    def _tapped(self, hooks: Sequence[str], take: Sink) -> Iterator[None]:
        """Forward hooks on just the modules that are asked for, gone afterwards whatever happens."""
        handles = []
        try:
            for name in hooks:
                layer, leaf = split(name)
                site = self.architecture.sites[leaf]
                module = self._layers[layer].get_submodule(site.module)
                handles.append(_tap(module, site, name, take))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _tap(module: "nn.Module", site: Site, name: str, take: Sink) -> Any:
    if site.side == "input":

        def before(_module: "nn.Module", args: tuple[Any, ...]) -> None:
            take(name, args[0])

        return module.register_forward_pre_hook(before)

    def after(_module: "nn.Module", _args: Any, output: Any) -> None:
        # Attention modules and older layers return (value, weights).
        take(name, output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(after)


class _Finished(Exception):  # noqa: N818 - not an error
    """Raised inside the forward when the last hook has its value; ends it there."""


def load_config(name: str, *, revision: str | None = None) -> "PretrainedConfig":
    """The configuration of a model, without its weights.

    Raises:
        ModelError: there is no such model.
    """
    from transformers import AutoConfig

    if os.path.isfile(name):  # noqa: PTH113 - a Hub name is no path
        raise ModelError(f"{name} is a file; give the folder that it is in")
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):  # noqa: PTH112
        raise ModelError(
            f"there is no folder {name}; give the folder of a saved model, or its name on the Hub"
        )
    with _explaining(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
        return config


def resolve_hooks(config: "PretrainedConfig", patterns: Sequence[str]) -> tuple[str, ...]:
    """The canonical names that the patterns select in a model of this configuration.

    Raises:
        ModelError: the family is not supported.
        HookError: a pattern selects nothing.
    """
    family = architecture(config.model_type)
    return resolve(
        patterns,
        n_layers=config.num_hidden_layers,
        leaves=family.leaves(config),
        undefined=family.undefined(config),
    )


def layers_needed(hooks: Sequence[str]) -> int:
    """Layers that a forward for these hooks enters."""
    return 1 + max(layer_of(name) for name in hooks)


def _truncate(config: Any, n_layers: int) -> None:
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_layers]


def _check_loaded(name: str, loaded: dict[str, Any]) -> None:
    """transformers fills weights that a checkpoint lacks with random numbers, other ones each time.

    Raises:
        ModelError: there are such weights.
    """
    lacking = sorted(str(key) for key in [*loaded["missing_keys"], *loaded["mismatched_keys"]])
    if lacking:
        raise ModelError(
            f"the checkpoint of {name} lacks {len(lacking)} weights that the model needs, such as {lacking[0]}; it is "
            "damaged, or not of this architecture"
        )


@contextlib.contextmanager
def _explaining(name: str) -> Iterator[None]:
    """One sentence in place of what the Hub client raises."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if os.path.isdir(name):  # noqa: PTH112 - a Hub name is no path
            raise ModelError(
                f"the folder {name} does not hold a model that transformers can load: {error}"
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        offline = " (HF_HUB_OFFLINE is set, so only folders and cached models can be used)"
        raise ModelError(
            f"model {name!r} is neither a folder nor a model on the Hugging Face Hub that can be reached: {first}"
            + (offline if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True") else "")
        ) from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """A truncated model leaves weights unused on purpose; transformers would warn about each of them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    had_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bar:
            logging.enable_progress_bar()
