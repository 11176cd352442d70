"""Showing how well a model completes a prompt: ``test_prompt`` of TransformerLens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actstore.hooks.model import HookedModel


def check_prompt(
    prompt: str,
    answer: str | Sequence[str],
    model: "HookedModel",
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> None:
    """Print rank, logit and probability of an answer to a prompt, and the tokens that the model finds likeliest.

    Args:
        prompt: a text.
        answer: what should follow; of several answers, the first token of each is compared at the same place.
        model: the model.
        prepend_space_to_answer: begin answers with a space, if they do not.
        print_details: print more than the ranks.
        prepend_bos: begin the prompt with the BOS token; None for the default of the model.
        top_k: how many of the likeliest tokens to print.
    """
    import torch

    answers = [answer] if isinstance(answer, str) else list(answer)
    if prepend_space_to_answer:
        answers = [text if text.startswith(" ") else f" {text}" for text in answers]
    start = model.to_tokens(prompt, prepend_bos=prepend_bos)
    pieces = [model.to_str_tokens(text, prepend_bos=False) for text in answers]
    ends = model.to_tokens(answers, prepend_bos=False, padding_side="right")
    if len(answers) > 1:
        ends = ends[:, :1]
    tokens = torch.cat([start.repeat(len(answers), 1), ends], dim=1)
    if print_details:
        _print("Tokenized prompt:", model.to_str_tokens(prompt, prepend_bos=prepend_bos))
        _print("Tokenized answers:", pieces) if len(answers) > 1 else _print("Tokenized answer:", pieces[0])
    logits = model(tokens)
    ranks = []
    for place in range(ends.shape[1]):
        at = start.shape[1] + place - 1  # a token is predicted one position before it
        probs = logits[:, at].softmax(-1)
        order = probs.argsort(descending=True)
        its_ranks = (order == ends[:, place, None]).int().argmax(-1).tolist()
        ranks.append([(piece[place], rank) for piece, rank in zip(pieces, its_ranks, strict=True)])
        if not print_details:
            continue
        _print(f"Performance on answer token{'s' if len(answers) > 1 else ''}:")
        for row, (piece, rank) in enumerate(ranks[-1]):
            token = int(ends[row, place])
            _print(
                f"Rank: {rank: <8} Logit: {logits[row, at, token].item():5.2f} Prob: {probs[row, token].item():6.2%} "
                f"Token: |{piece}|"
            )
        for number, token in enumerate(order[0, :top_k].tolist()):
            _print(
                f"Top {number}th token. Logit: {logits[0, at, token].item():5.2f} Prob: {probs[0, token].item():6.2%} "
                f"Token: |{model.to_string(token)}|"
            )
    _print("Ranks of the answer tokens:", ranks if len(answers) > 1 else [rank[0] for rank in ranks])


check_prompt.__test__ = False  # type: ignore[attr-defined]  # as `test_prompt` it looks like a test to pytest


def _print(*values: object) -> None:
    print(*values)  # noqa: T201 - printing is what it is for
