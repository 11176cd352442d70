"""The part of a hooked model that takes text and gives text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from actstore.errors import TokensError
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.text.inputs import as_mask, as_token_ids, check_text, embeddable, is_array_of_ids
from actstore.hooks.text.past import check_rows, with_past
from actstore.hooks.text.prompts import PaddingSide, Prompts

if TYPE_CHECKING:
    import torch


class WithText(ABC):
    """TransformerLens' methods that use the tokenizer. Without a tokenizer they raise TokensError."""

    cfg: HookedConfig

    def __init__(self, prompts: Prompts | None, why_none: str | None = None) -> None:
        """
        Args:
            prompts: the tokenizer; None for a model without one.
            why_none: why there is no tokenizer, for error messages.
        """
        self._prompts = prompts
        self._why_none = why_none

    @property
    @abstractmethod
    def device(self) -> "torch.device":
        """The device of the model."""

    @property
    def has_tokenizer(self) -> bool:
        return self._prompts is not None

    @property
    def tokenizer(self) -> Any:
        return self._text().tokenizer

    def to_tokens(
        self,
        text: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> "torch.Tensor":
        """Ids, int64 [batch, position], on the device of the model; shorter rows are padded.

        The model tells padding from tokens only if ``tokenizer.padding_side`` is ``left``: give it the texts, or
        `to_tokens_and_mask`, if they differ in length.

        Args:
            text: one text, or several.
            prepend_bos: begin with the BOS token; None for the default of this model.
            padding_side: where shorter rows are filled up; None for ``tokenizer.padding_side``.
            move_to_device: put the ids on the device of the model; otherwise they are on the CPU.
            truncate: cut to the longest row that the model is made for.
        """
        ids, _ = self._to_tokens(text, prepend_bos, padding_side, truncate)
        return ids.to(self.device) if move_to_device else ids

    def to_tokens_and_mask(
        self,
        text: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        truncate: bool = True,
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Ids and attention mask [batch, position] of text, for a call of the model; the mask is 0 at padding.

        Arguments are those of `to_tokens`.
        """
        ids, mask = self._to_tokens(text, prepend_bos, padding_side, truncate)
        return ids.to(self.device), mask.to(self.device)

    def _to_tokens(
        self,
        text: str | Sequence[str],
        prepend_bos: bool | None,
        padding_side: PaddingSide | None,
        truncate: bool,
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        limit = self.cfg.n_ctx if truncate else None
        return self._text().to_tokens(
            text, prepend_bos=self._begins(prepend_bos), padding_side=padding_side, truncate=limit
        )

    def to_string(
        self, tokens: "torch.Tensor | Sequence[int] | Sequence[torch.Tensor] | int"
    ) -> str | list[str]:
        """The text of ids [position], or of each row of ids [batch, position]."""
        return self._text().to_string(tokens)

    def to_str_tokens(
        self, text: Any, prepend_bos: bool | None = None, padding_side: PaddingSide | None = None
    ) -> Any:
        """The pieces of one text, or of ids [position], each as text; of each in a list of these, a list of lists.

        ``padding_side`` is taken for TransformerLens' sake: one row needs no padding.
        """
        del padding_side
        return self._text().to_str_tokens(text, prepend_bos=self._begins(prepend_bos))

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
            NoSuchTokenError: the text is not one token; the message shows the tokens.
        """
        return self._text().to_single_token(text)

    def to_single_str_token(self, token: int) -> str:
        """The text of one id."""
        pieces: list[str] = self._text().to_str_tokens([token])
        return pieces[0]

    def get_token_position(
        self,
        token: str | int,
        text: "str | torch.Tensor",
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> int:
        """The position of a token in a text or in ids [position], the first or the last one.

        ``padding_side`` is taken for TransformerLens' sake: one row needs no padding.

        Raises:
            NoSuchTokenError: the token is not there.
        """
        del padding_side
        return self._text().get_token_position(token, text, mode=mode, prepend_bos=self._begins(prepend_bos))

    def _begins(self, prepend_bos: bool | None) -> bool | None:
        return self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos

    def _text(self) -> Prompts:
        if self._prompts is None:
            reason = f" ({self._why_none})" if self._why_none else ""
            raise TokensError(
                f"this model was loaded without a tokenizer{reason}; give token ids, or HookedModel(model, tokenizer)"
            )
        return self._prompts

    @abstractmethod
    def _check_padding(self, mask: "torch.Tensor") -> None:
        """Refuse padding that the model does not ignore.

        Raises:
            TokensError: the model would compute with the padding of a mask [batch, position].
        """

    def _input(
        self,
        given: Any,
        prepend_bos: bool | None,
        padding_side: PaddingSide | None,
        mask: "torch.Tensor | None",
        *,
        past: Any = None,
    ) -> tuple["torch.Tensor", "torch.Tensor | None"]:
        """(ids [batch, position], mask or None) on the device of the model.

        Args:
            given: text, texts or ids.
            prepend_bos: begin text with the BOS token; ids that are padded on the left have it.
            padding_side: where shorter texts are padded, or ids have been; None for ``tokenizer.padding_side``.
            mask: mask for ids, or for earlier positions and ids.
            past: a cache of Hugging Face with earlier positions, or None.
        """
        import torch

        n_past = 0 if past is None else int(past.get_seq_length())
        limit = None if self.cfg.n_ctx is None else self.cfg.n_ctx - n_past
        if isinstance(given, torch.Tensor) or is_array_of_ids(given) or _is_list_of_ids(given):
            ids = as_token_ids(given, limit)
            check_rows(past, n_past, len(ids))
            if mask is not None:
                there = getattr(mask, "device", ids.device)
                if n_past and getattr(mask, "shape", None) == ids.shape:
                    mask = with_past(past, n_past, ids.to(there), mask)
                earlier = ids.new_zeros(1, n_past).expand(len(ids), -1).to(there)
                mask = as_mask(mask, torch.cat([earlier, ids.to(there)], dim=1))
            else:
                if self._prompts is not None and not n_past:
                    mask = self._prompts.mask_of_padding(
                        ids, prepend_bos=self._begins(prepend_bos), padding_side=padding_side
                    )
                if past is not None:
                    mask = with_past(past, n_past, ids, mask)
        else:
            if mask is not None:
                raise TokensError("attention_mask is made from the text; give it only with token ids")
            check_text(given)
            ids, mask = self._text().to_tokens(
                given, prepend_bos=self._begins(prepend_bos), padding_side=padding_side
            )
            ids = as_token_ids(ids, limit)
            check_rows(past, n_past, len(ids))
            if past is not None:
                mask = with_past(past, n_past, ids, mask)
        if mask is not None:
            self._check_padding(mask)
            mask = mask.to(self.device)
        new = None if mask is None else mask[:, n_past:]
        return embeddable(ids.to(self.device), new, self.cfg.d_vocab), mask


def _is_list_of_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and not any(isinstance(item, str) for item in given)
