"""How the next token is chosen: TransformerLens' arguments as settings of Hugging Face's generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.errors import TokensError
from actstore.hooks.messages.quoted import quoted

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Choosing:
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    freq_penalty: float
    repetition_penalty: float
    eos_token_ids: Sequence[int]
    """Tokens that end a row; rows that have ended are filled up with the first one."""
    stop_strings: Sequence[str] = ()
    """Texts that end a row."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning.

        Raises:
            TokensError: a setting is out of its range.
        """
        ranges = {
            "max_new_tokens": (self.max_new_tokens, _is_count(self.max_new_tokens), "at least 1"),
            "temperature": (self.temperature, self.temperature >= 0, "0 (greedy) or above"),
            "top_k": (self.top_k, self.top_k is None or _is_count(self.top_k), "at least 1, or None"),
            "top_p": (
                self.top_p,
                self.top_p is None or 0 < self.top_p <= 1,
                "above 0 and at most 1, or None",
            ),
            "freq_penalty": (self.freq_penalty, self.freq_penalty >= 0, "0 (none) or above"),
            "repetition_penalty": (
                self.repetition_penalty,
                self.repetition_penalty > 0,
                "above 0; 1 is none",
            ),
        }
        for name, (value, is_valid, valid) in ranges.items():
            if not is_valid:
                raise TokensError(f"{name} is {quoted(value)}; choose {valid}")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise TokensError(f"stop_strings holds {quoted(text)}; give texts that are not empty")

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    def config(self, *, use_cache: bool) -> Any:
        """The settings of Hugging Face's generation, with none of those that come with a model."""
        from transformers import GenerationConfig

        sampling: dict[str, Any] = {"do_sample": False}
        if not self.is_greedy:
            # Hugging Face keeps the best 50 unless told otherwise.
            sampling = {
                "do_sample": True,
                "temperature": float(self.temperature),
                "top_k": self.top_k or 0,
                "top_p": 1.0 if self.top_p is None else float(self.top_p),
            }
        eos = list(self.eos_token_ids)
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=eos or None,
            pad_token_id=eos[0] if eos else None,
            stop_strings=list(self.stop_strings) or None,
            use_cache=use_cache,
            return_dict_in_generate=True,
            **sampling,
        )

    def processors(self, mask: "torch.Tensor") -> list[Any]:
        """What changes logits [batch, d_vocab] before Hugging Face divides by the temperature.

        Args:
            mask: [batch, position] of the prompt, 0 at padding, whose tokens are not there.
        """
        has_frequency = bool(self.freq_penalty) and not self.is_greedy
        if not has_frequency and self.repetition_penalty == 1:
            return []

        def penalised(ids: "torch.Tensor", logits: "torch.Tensor") -> "torch.Tensor":
            import torch

            is_there = torch.ones_like(ids, dtype=logits.dtype)
            is_there[:, : mask.shape[1]] = mask.to(is_there)
            counts = torch.zeros_like(logits).scatter_add_(-1, ids, is_there)
            scaled = torch.where(
                logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty
            )
            logits = torch.where(counts > 0, scaled, logits)
            # TransformerLens subtracts after it divides.
            return logits - self.freq_penalty * self.temperature * counts if has_frequency else logits

        return [penalised]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
