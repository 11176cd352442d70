"""How much is computed at once: tokens of a layer, tokens of a whole forward, and bytes of logits."""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    from actstore.hooks.model import HookedModel

_TOKENS_ON_CPU: Final = 1024
_TOKENS_ELSEWHERE: Final = 2048
_LEAST_LOGITS: Final = 8 << 20
"""Bytes of logits that are made at once in any case. With fewer, the head is slow."""
_MOST_LOGITS: Final = 64 << 20
"""Bytes of logits that packed rows make at once. More are no faster."""


def tokens_at_once(device: "torch.device") -> int:
    """Tokens that go through a layer in one call. More need memory for values within the layer, and are no faster.

    On a CPU they are slower: malloc gives values of many megabytes back to the system each time, whose pages are then
    new in each layer, which took a tenth of the time.
    """
    return _TOKENS_ON_CPU if device.type == "cpu" else _TOKENS_ELSEWHERE


def token_nbytes(d_model: int, itemsize: int) -> int:
    """Bytes of a token on the way: its residual stream, and about as much again for values within the layer."""
    return 2 * d_model * itemsize


def logits_at_once(stream: "torch.Tensor", d_vocab: int, max_tokens: int) -> int:
    """Tokens whose logits packed rows make at once.

    Args:
        stream: a residual stream [..., d_model].
        d_vocab: size of the vocabulary.
        max_tokens: the most tokens that are on the way at once; logits take no more memory than these, or 8 MiB.
    """
    itemsize = stream.element_size()
    nbytes = min(_MOST_LOGITS, _budget(stream.shape[-1], itemsize, max_tokens))
    return max(1, nbytes // (d_vocab * itemsize))


def tokens_of_forward(model: "HookedModel", max_tokens: int) -> int:
    """Tokens of one whole forward, which has logits for all of them.

    Args:
        model: the model.
        max_tokens: the most tokens that are on the way at once; logits take no more memory than these, or 8 MiB.
    """
    itemsize = model.dtype.itemsize
    by_logits = _budget(model.cfg.d_model, itemsize, max_tokens) // (model.cfg.d_vocab * itemsize)
    return max(1, min(max_tokens, tokens_at_once(model.device), by_logits))


def _budget(d_model: int, itemsize: int, max_tokens: int) -> int:
    """Bytes of logits that are made at once."""
    return max(_LEAST_LOGITS, max_tokens * token_nbytes(d_model, itemsize))
