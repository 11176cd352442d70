"""What a run of a language model gives back: logits, loss, or both."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

ReturnType = Literal["logits", "loss", "both"] | None


def output(
    logits: "torch.Tensor",
    tokens: "torch.Tensor",
    mask: "torch.Tensor | None",
    return_type: ReturnType,
    *,
    per_token: bool,
) -> Any:
    """Logits [batch, position, d_vocab], the loss, or (logits, loss)."""
    if return_type == "logits":
        return logits
    loss = next_token_loss(logits, tokens, mask, per_token=per_token)
    return loss if return_type == "loss" else (logits, loss)


def next_token_loss(
    logits: "torch.Tensor", tokens: "torch.Tensor", mask: "torch.Tensor | None", *, per_token: bool
) -> "torch.Tensor":
    """Cross-entropy of each next token, in nats.

    The mean over real tokens; or one each, [batch, position - 1], 0 at padding.
    """
    import torch

    log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    losses = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
    if mask is None:
        return losses if per_token else losses.mean()
    # A token counts where it and the one before it are real.
    real = (mask[:, 1:] * mask[:, :-1]).to(losses.dtype)
    return losses * real if per_token else (losses * real).sum() / real.sum()
