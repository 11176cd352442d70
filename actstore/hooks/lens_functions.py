"""``actstore.utils``: the functions of ``transformer_lens.utils`` that notebooks use, under their names.

Those that read the Hub's special data sets, start weights or choose devices for layers are left out.
"""

import operator
from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

from actstore.hooks.cache.slicing import Slice, SliceInput
from actstore.hooks.loading.pretrained import chosen_device
from actstore.hooks.loss import next_token_loss
from actstore.hooks.naming.names import long_name
from actstore.hooks.prompt_check import check_prompt as test_prompt
from actstore.hooks.text.concatenated import tokenize_and_concatenate
from actstore.hooks.text.inputs import as_mask
from actstore.hooks.text.padding import get_attention_mask
from actstore.hooks.weights.factored_matrix import FactoredMatrix, SizesError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = [
    "Slice",
    "SliceInput",
    "composition_scores",
    "filter_dict_by_prefix",
    "gelu_fast",
    "gelu_new",
    "get_act_name",
    "get_attention_mask",
    "get_corner",
    "get_cumsum_along_dim",
    "get_device",
    "get_nested_attr",
    "is_lower_triangular",
    "is_square",
    "keep_single_column",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "remove_batch_dim",
    "repeat_along_head_dimension",
    "set_nested_attr",
    "solu",
    "test_prompt",
    "to_numpy",
    "tokenize_and_concatenate",
    "transpose",
]


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The canonical name of a hook: ``get_act_name("z", 3)`` is ``blocks.3.attn.hook_z``.

    Raises:
        HookError: the layer counts from the end.
    """
    if layer is None and layer_type is None:
        return long_name(name)
    return long_name((name, None if layer is None else int(layer), layer_type))  # type: ignore[arg-type]


def to_numpy(tensor: Any) -> "NDArray[Any]":
    """A tensor, list or number as an array; bfloat16 becomes float32, which NumPy knows."""
    import numpy as np
    import torch

    if isinstance(tensor, torch.Tensor):
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # type: ignore[no-any-return]
    return np.asarray(tensor)


def lm_cross_entropy_loss(
    logits: "torch.Tensor",
    tokens: "torch.Tensor",
    attention_mask: "torch.Tensor | None" = None,
    per_token: bool = False,
) -> "torch.Tensor":
    """`HookedModel.loss_fn`: cross-entropy of each next token in nats, as a mean or [batch, position - 1]."""
    mask = None if attention_mask is None else as_mask(attention_mask, tokens)
    return next_token_loss(logits, tokens, mask, per_token=per_token)


def lm_accuracy(logits: "torch.Tensor", tokens: "torch.Tensor", per_token: bool = False) -> "torch.Tensor":
    """Whether the likeliest next token is right: the share, or bool [batch, position - 1]."""
    correct = logits.argmax(-1)[:, :-1] == tokens[:, 1:]
    return correct if per_token else correct.float().mean()


def get_device() -> str:
    """``cuda`` if there is a GPU that PyTorch knows, else ``cpu``."""
    return chosen_device(None)


def remove_batch_dim(tensor: "torch.Tensor") -> "torch.Tensor":
    """The tensor without its first axis, if that has size 1."""
    return tensor[0] if tensor.shape[0] == 1 else tensor


def get_cumsum_along_dim(tensor: "torch.Tensor", dim: int, reverse: bool = False) -> "torch.Tensor":
    """Running sums along an axis, from its end with ``reverse``."""
    return tensor.flip(dim).cumsum(dim).flip(dim) if reverse else tensor.cumsum(dim)


def get_corner(tensor: Any, n: int = 3) -> Any:
    """The first entries along every axis."""
    return tensor[(slice(n),) * tensor.ndim]


def transpose(tensor: "torch.Tensor") -> "torch.Tensor":
    """The tensor with its last two axes exchanged."""
    return tensor.transpose(-1, -2)


def is_square(x: "torch.Tensor") -> bool:
    """Whether this is one square matrix."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: "torch.Tensor") -> bool:
    """Whether this is one square matrix with zeros above its diagonal."""
    return is_square(x) and x.equal(x.tril())


def repeat_along_head_dimension(
    tensor: "torch.Tensor", n_heads: int, clone_tensor: bool = True
) -> "torch.Tensor":
    """[batch, position, d_model] as [batch, position, n_heads, d_model], a copy for each head or a view."""
    repeated = tensor[:, :, None].expand(-1, -1, n_heads, -1)
    return repeated.clone() if clone_tensor else repeated


def composition_scores(
    left: FactoredMatrix, right: FactoredMatrix, broadcast_dims: bool = True
) -> "torch.Tensor":
    """|left right| / (|left| |right|) in Frobenius norms, for each pair of their leading axes.

    Args:
        left: what writes.
        right: what reads.
        broadcast_dims: compare every left with every right matrix; False for those at the same index.

    Raises:
        SizesError: the matrices cannot be multiplied.
    """
    if left.rdim != right.ldim:
        raise SizesError(
            f"matrices of shape {left.shape} cannot be multiplied by those of shape {right.shape}"
        )
    if broadcast_dims:
        n_left, n_right = left.ndim - 2, right.ndim - 2
        for axis in range(n_left):
            right = right.unsqueeze(axis)
        for axis in range(n_right):
            left = left.unsqueeze(n_left + axis)
    import torch

    one, other = left.collapse_l(), right.collapse_r()
    norm = torch.linalg.matrix_norm
    scores: torch.Tensor = norm(one @ other) / norm(other) / norm(one)
    return scores


def gelu_new(input: "torch.Tensor") -> "torch.Tensor":  # noqa: A002 - name of TransformerLens
    """GELU by tanh, as in GPT-2."""
    from torch.nn.functional import gelu

    return gelu(input, approximate="tanh")


gelu_fast = gelu_new
"""The same function, under the name that GPT-J has for it."""


def solu(input: "torch.Tensor") -> "torch.Tensor":  # noqa: A002
    """SoLU: values times their softmax. See https://transformer-circuits.pub/2022/solu/index.html"""
    return input * input.softmax(-1)


def filter_dict_by_prefix(dictionary: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose keys begin with a prefix and a dot, without these."""
    start = f"{prefix.removesuffix('.')}."
    return {key.removeprefix(start): value for key, value in dictionary.items() if key.startswith(start)}


def get_nested_attr(obj: Any, attr_str: str) -> Any:
    """``obj.a.b.c`` for ``"a.b.c"``."""
    return operator.attrgetter(attr_str)(obj)


def set_nested_attr(obj: Any, attr_str: str, value: Any) -> None:
    """Set ``obj.a.b.c`` for ``"a.b.c"``."""
    *path, last = attr_str.split(".")
    setattr(reduce(getattr, path, obj), last, value)


def keep_single_column(dataset: Any, col_name: str) -> Any:
    """A dataset of Hugging Face with one of its columns."""
    return dataset.remove_columns([name for name in dataset.features if name != col_name])
