"""A sparse autoencoder or transcoder in the forward of a model, as SAELens' models attach theirs."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Protocol

from actstore.errors import HookError
from actstore.hooks.capture.inserted import Visit
from actstore.hooks.messages.quoted import quoted
from actstore.hooks.naming.hook_points import is_read_only
from actstore.hooks.naming.names import HookNames

if TYPE_CHECKING:
    import torch

INNER: Final = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_error",
    "hook_sae_output",
)
"""Hooks of SAEs, in the order in which they have values."""


class Autoencoder(Protocol):
    """An SAE of SAELens, or any object with these.

    ``cfg.metadata.hook_name`` or ``cfg.hook_name`` says where it belongs, ``hook_name_out`` where a transcoder writes.
    Modules such as ``hook_sae_acts_pre``, through which ``encode`` and ``decode`` pass values, become hooks.
    """

    cfg: Any

    def encode(self, x: "torch.Tensor", /) -> "torch.Tensor":
        """Features [batch, position, d_sae] of a value [batch, position, d_in]."""
        ...

    def decode(self, feature_acts: "torch.Tensor", /) -> "torch.Tensor":
        """The value that features stand for [batch, position, d_out]."""
        ...


class AttachedSae:
    """Puts what an SAE makes of the value of a hook in its place."""

    def __init__(self, sae: Autoencoder, names: HookNames, *, use_error_term: bool | None = None) -> None:
        """
        Args:
            sae: the SAE.
            names: hooks of the model.
            use_error_term: add what the SAE does not reconstruct, so that the model computes as without it, unless a
                function changes features; None for the setting of the SAE.

        Raises:
            HookError: the model does not have the hook, it cannot be changed, or the object is no SAE that can be
                attached.
        """
        if not callable(getattr(sae, "encode", None)) or not callable(getattr(sae, "decode", None)):
            raise HookError(f"expected an SAE with the methods encode and decode, found {quoted(sae)}")
        if getattr(sae, "W_skip", None) is not None:
            raise HookError(
                "this transcoder has a skip connection, which encode and decode leave out; call it in a function on "
                "the hook"
            )
        self.sae = sae
        self.given_name = _setting(sae, "hook_name")
        if not self.given_name:
            raise HookError("the SAE does not say where it belongs; set sae.cfg.metadata.hook_name")
        self.reads = names.one(self.given_name)
        self.writes = names.one(_setting(sae, "hook_name_out") or self.given_name)
        if is_read_only(self.writes):
            raise HookError(
                f"{self.writes} can be read but not changed, so nothing can stand in its place; choose another hook"
            )
        self.use_error_term = bool(
            getattr(sae, "use_error_term", False) if use_error_term is None else use_error_term
        )
        own = [
            leaf for leaf in INNER if leaf not in _MODULES or self._module(leaf) is not None or leaf in _BASIC
        ]
        self.leaves = [leaf for leaf in own if self.use_error_term or leaf != "hook_sae_error"]
        """Its hooks, without the name of the hook that it writes to, which stands before."""
        self._read: torch.Tensor | None = None

    def __call__(self, name: str, value: "torch.Tensor", visit: Visit) -> "torch.Tensor":
        """See `actstore.hooks.capture.inserted.Inserted`."""
        if self.reads == self.writes:
            return self._replaced(value, value, visit)
        if name == self.reads:
            self._read = value.clone()
            return value
        read, self._read = self._read, None
        if read is None:
            raise HookError(f"a transcoder writes to {self.writes} before it has read {self.reads}")
        return self._replaced(read, value, visit)

    def _replaced(self, read: "torch.Tensor", value: "torch.Tensor", visit: Visit) -> "torch.Tensor":
        import torch

        given = self._ready(read)
        d_in = _setting(self.sae, "d_in")
        if isinstance(d_in, int) and d_in != given[0, 0].numel():
            raise HookError(
                f"the SAE reads {d_in} numbers, and {self.reads} has {given[0, 0].numel()}; attach it to the hook that "
                "it was trained on"
            )
        with ExitStack() as stack:
            for leaf in _MODULES:
                module = self._module(leaf)
                if module is not None:
                    stack.callback(module.register_forward_hook(self._shown(leaf, visit)).remove)
            features = self.sae.encode(self._visited("hook_sae_input", given, visit))
            features = self._visited("hook_sae_acts_post", features, visit)
            output = self._visited("hook_sae_recons", self.sae.decode(features), visit)
        output = self._like(value, output)
        if self.use_error_term:
            with torch.no_grad():
                # Functions on features must not change the error.
                error = value - self._like(value, self.sae.decode(self.sae.encode(given)))
            output = output + visit(f"{self.writes}.hook_sae_error", error)
        return visit(f"{self.writes}.hook_sae_output", output)

    def _visited(self, leaf: str, value: "torch.Tensor", visit: Visit) -> "torch.Tensor":
        """The value after functions on an inner hook, unless a module of the SAE shows it."""
        return value if self._module(leaf) is not None else visit(f"{self.writes}.{leaf}", value)

    def _shown(self, leaf: str, visit: Visit) -> Any:
        def show(_module: Any, _args: Any, output: "torch.Tensor") -> "torch.Tensor":
            return visit(f"{self.writes}.{leaf}", output)

        return show

    def _module(self, leaf: str) -> Any:
        import torch

        module = getattr(self.sae, leaf, None)
        return module if leaf in _MODULES and isinstance(module, torch.nn.Module) else None

    def _ready(self, value: "torch.Tensor") -> "torch.Tensor":
        """A value on the device of the SAE, with heads side by side unless the SAE does that itself."""
        if value.ndim == 4 and not getattr(self.sae, "hook_z_reshaping_mode", False):
            value = value.flatten(-2)
        return value.to(getattr(self.sae, "device", value.device))

    @staticmethod
    def _like(value: "torch.Tensor", output: "torch.Tensor") -> "torch.Tensor":
        """What the SAE made, with shape, device and dtype of the value in whose place it goes."""
        if output.numel() != value.numel():
            raise HookError(
                f"the SAE gave shape {tuple(output.shape)} for a value of shape {tuple(value.shape)}; attach it to the "
                "hook that it was trained on"
            )
        return output.reshape(value.shape).to(value)


_MODULES: Final = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")
_BASIC: Final = ("hook_sae_input", "hook_sae_acts_post", "hook_sae_recons")


def several(saes: Any) -> Iterator[Autoencoder]:
    """One SAE, or those of a list."""
    yield from saes if isinstance(saes, list | tuple) else [saes]


def _setting(sae: Any, name: str) -> Any:
    """A setting of an SAE, from its metadata or its configuration itself; None if it is in neither."""
    cfg = getattr(sae, "cfg", None)
    for holder in (getattr(cfg, "metadata", None), cfg):
        value = getattr(holder, name, None)
        if value is not None:
            return value
    return None
