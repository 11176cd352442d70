"""Weights of modules, refused unless the forward uses them as they are.

An adapter adds to the output of a module and leaves its weight alone, a quantised module keeps codes in its place, and
the weight of an offloaded module is not in memory. They are refused, so that no result comes from an unused weight.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import ModelError

if TYPE_CHECKING:
    import torch

_N_PROBES: Final = 4
_WRAPPED: Final = ("base_layer", "original_module")
"""Attributes of PEFT's adapters that hold the module that they wrap."""


def projection(module: Any) -> "torch.Tensor":
    """Weight of a linear module as a view [in, out]. GPT-2's Conv1D keeps it in this order, Linear in the other one.

    Raises:
        ModelError: the module does not multiply by a weight alone.
    """
    used = _used_linear(module)
    weight: torch.Tensor = used.weight
    return weight if _is_conv1d(used) else weight.T


def bias(module: Any) -> "torch.Tensor":
    """Bias [out] of a linear module; zeros if it has none.

    Raises:
        ModelError: the module does not multiply by a weight alone.
    """
    used = _used_linear(module)
    bias: torch.Tensor | None = used.bias
    return (
        bias if bias is not None else used.weight.new_zeros(used.weight.shape[1 if _is_conv1d(used) else 0])
    )


def embedding(module: Any) -> Any:
    """The module whose weight an embedding looks up: itself, or the module in an adapter that changes nothing.

    Raises:
        ModelError: the embedding does more than look up a weight.
    """

    import torch

    def ids(used: Any) -> "torch.Tensor":
        # An adapter can change single rows.
        n_rows = used.weight.shape[0] if _has_parts(module) else _N_PROBES
        return torch.arange(n_rows, device=used.weight.device)

    # Embeddings that scale, or begin at another row, are known; others could do anything.
    own = type(module).forward
    is_known = (
        own is torch.nn.Embedding.forward or hasattr(module, "embed_scale") or hasattr(module, "offset")
    )
    return _used(module, is_plain=is_known and _is_own(module), probe=ids)


def norm(module: Any) -> Any:
    """The module whose weight and bias a norm uses: itself, or the module in an adapter that changes nothing.

    Raises:
        ModelError: the norm does not use a weight of its own alone.
    """
    return _used(module, is_plain=_is_own(module), probe=lambda used: _noise(used, used.weight.shape[0]))


def _used_linear(module: Any) -> Any:
    import torch
    from transformers.pytorch_utils import Conv1D

    def rows(used: Any) -> "torch.Tensor":
        return _noise(used, used.weight.shape[0 if _is_conv1d(used) else 1])

    own = type(module).forward
    is_plain = own in (torch.nn.Linear.forward, Conv1D.forward) and not _is_replaced(module)
    return _used(module, is_plain=is_plain, probe=rows)


def _used(module: Any, *, is_plain: bool, probe: Callable[[Any], "torch.Tensor"]) -> Any:
    if is_plain:
        _check_readable(module)
        return module
    for inner in _inner(module):
        _check_readable(inner)
        if _gives_the_same(module, inner, probe(inner)):
            return inner
    raise _not_used(module)


def _inner(module: Any) -> Iterator[Any]:
    """The modules in an adapter, or the module itself: one of them may be all that it computes with."""
    import torch

    for name in _WRAPPED:
        if isinstance(inner := getattr(module, name, None), torch.nn.Module):
            # One adapter can be around another.
            yield from _inner(inner) if _has_parts(inner) else (inner,)
    trained = getattr(module, "modules_to_save", None)
    if isinstance(trained, torch.nn.ModuleDict):
        yield from trained.values()
    if not _has_parts(module):
        yield module


def _gives_the_same(module: Any, inner: Any, probe: "torch.Tensor") -> bool:
    """Whether a module gives the same as one of its parts, bit for bit."""
    import torch
    from transformers.pytorch_utils import Conv1D

    # A subclass is compared with what it is a subclass of.
    plain = (kind for kind in (torch.nn.Linear, Conv1D, torch.nn.Embedding) if isinstance(inner, kind))
    forward: Any = next(plain, type(inner)).forward
    try:
        with torch.no_grad():
            return torch.equal(module.forward(probe), forward(inner, probe))
    except Exception:  # noqa: BLE001 - a plain product raises nothing
        return False


def _is_conv1d(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _has_parts(module: Any) -> bool:
    return any(name in module._modules for name in _WRAPPED)


def _is_own(module: Any) -> bool:
    """Whether a module is one of the model itself, whose weight was compared with its values when it was loaded."""
    return not _has_parts(module) and not _is_replaced(module)


def _is_replaced(module: Any) -> bool:
    """Whether the forward of a module was replaced, by anything but accelerate, which only moves values."""
    return "forward" in vars(module) and not hasattr(module, "_hf_hook")


def _noise(module: Any, size: int) -> "torch.Tensor":
    import torch

    noise = torch.randn(_N_PROBES, size, generator=torch.Generator().manual_seed(0))
    return noise.to(module.weight.device, module.weight.dtype)


def _check_readable(module: Any) -> None:
    import torch

    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise _not_used(module)
    # Some subclasses of tensors can be transposed and multiplied, others fail; none is the matrix itself.
    kind = type(weight)
    if kind not in (torch.Tensor, torch.nn.Parameter) or not weight.is_floating_point():
        raise ModelError(
            f"{_this(module)} keeps its weight as {kind.__name__}, which is no matrix of numbers; hooks work, but to "
            "see weights load the model without quantisation"
        )
    if weight.is_meta:
        raise ModelError(
            f"{_this(module)} has its weight offloaded, not in memory; hooks work, but to see weights load the model "
            "whole onto one device"
        )


def _not_used(module: Any) -> ModelError:
    if _has_parts(module):
        return ModelError(
            f"{_this(module)} is changed by an adapter, so the forward does not use its weight alone; hooks work, but "
            "to see weights call merge_and_unload() on the PeftModel of peft, and wrap the model that it gives"
        )
    return ModelError(
        f"{_this(module)} does not give the product with its weight; hooks work, but to see weights load the model "
        "without quantisation, or call merge_and_unload() if it has adapters"
    )


def _this(module: Any) -> str:
    return f"in this model a module of type {type(module).__name__}"


def placed_for(module: Any, value: "torch.Tensor") -> "torch.Tensor":
    """A value on the device and in the dtype of a module's weight, if it has one in memory."""
    import torch

    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.is_meta or not weight.is_floating_point():
        return value
    return value.to(weight.device, weight.dtype)
