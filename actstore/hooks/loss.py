"""The output of a run of a language model: logits, loss, or both."""

from typing import TYPE_CHECKING, Any, Literal

from actstore.errors import TokensError

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


def check_has_loss(tokens: "torch.Tensor", mask: "torch.Tensor | None") -> None:
    """Refuse tokens without any next-token loss, whose mean would be NaN.

    Raises:
        TokensError: no token has a loss.
    """
    if tokens.shape[1] < 2 or (mask is not None and not bool(_is_next(mask).any())):
        raise TokensError(
            "no token has a loss: every row has one token, or gaps of padding between all of its "
            "tokens; give longer rows, or choose return_type='logits'"
        )


def next_token_loss(
    logits: "torch.Tensor", tokens: "torch.Tensor", mask: "torch.Tensor | None", *, per_token: bool
) -> "torch.Tensor":
    """Cross-entropy of each next token, in nats.

    A token counts where neither it nor the one just before it is padding. So padding on either side does not change the
    loss of a row, and the first token after a gap has none, as in TransformerLens.

    Returns:
        The mean over these tokens; or, per token, [batch, position - 1] with 0 at the others.
    """
    import torch

    log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    losses = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
    if mask is None:
        return losses if per_token else losses.mean()
    counts = _is_next(mask)
    losses = losses.masked_fill(~counts, 0.0)
    return losses if per_token else losses.sum() / counts.sum()


def _is_next(mask: "torch.Tensor") -> "torch.Tensor":
    """Whether each next token has a loss, bool [batch, position - 1]."""
    return (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
