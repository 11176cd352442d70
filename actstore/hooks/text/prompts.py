"""Turning text into token ids and back, with TransformerLens' names."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from actstore.errors import NoSuchTokenError, TokensError
from actstore.hooks.messages.quoted import quoted
from actstore.hooks.text.inputs import check_text, check_unicode
from actstore.hooks.text.padding import mask_of_left_padding

if TYPE_CHECKING:
    import torch

PaddingSide = Literal["left", "right"]


class Prompts:
    """A tokenizer that adds the BOS token only where ``prepend_bos`` says so."""

    def __init__(self, tokenizer: Any, *, prepend_bos: bool | None = None) -> None:
        """
        Args:
            tokenizer: a tokenizer of Hugging Face.
            prepend_bos: default of every method; None for True if the tokenizer has a BOS token.

        Raises:
            TokensError: ``prepend_bos`` is True, and the tokenizer has no BOS token.
        """
        self.tokenizer = tokenizer
        has_bos = tokenizer.bos_token_id is not None
        if prepend_bos and not has_bos:
            raise TokensError(f"prepend_bos is True, but {_name(tokenizer)} has no BOS token; choose False")
        self.prepend_bos = has_bos if prepend_bos is None else prepend_bos

    def to_tokens(
        self,
        text: str | Sequence[str],
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = "right",
        truncate: int | None = None,
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """(ids, mask), both int64 [batch, position]; the mask is 0 where a row is padded.

        With ``padding_side=None``, rows are padded on the side that the tokenizer names.

        Raises:
            TokensError: there is no text, a text gives no token, or the tokenizer has no BOS token to prepend.
        """
        import torch

        if padding_side is None:
            padding_side = self.tokenizer.padding_side
        if padding_side not in ("left", "right"):
            raise TokensError(f"padding_side is {padding_side!r}; choose 'left' or 'right'")
        texts = check_text(text)
        begin = self._begin(prepend_bos)
        rows = [begin + list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        rows = [row if truncate is None else row[:truncate] for row in rows]
        if not all(rows):
            raise TokensError(f"text {rows.index([])} gives no token; give some text, or prepend_bos=True")
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self._pad_id())
        mask = torch.zeros((len(rows), length), dtype=torch.int64)
        for index, row in enumerate(rows):
            where = slice(length - len(row), None) if padding_side == "left" else slice(len(row))
            ids[index, where] = torch.tensor(row)
            mask[index, where] = 1
        return ids, mask

    def mask_of_padding(
        self,
        tokens: "torch.Tensor",
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> "torch.Tensor | None":
        """The mask of ids [batch, position] that `to_tokens` has padded on the left.

        Padding on the right is not looked for: it shows in no value of a token before it.

        Args:
            tokens: ids.
            prepend_bos: whether rows begin with BOS; None for the default.
            padding_side: the side of the padding; None for that which the tokenizer is set to.

        Returns:
            The mask, 0 at padding; None where nothing is padded on the left.
        """
        if (padding_side or self.tokenizer.padding_side) != "left":
            return None
        pad = self._pad_id()
        begins = self.prepend_bos if prepend_bos is None else prepend_bos
        return mask_of_left_padding(
            tokens, pad, begins_with_pad=begins and self.tokenizer.bos_token_id == pad
        )

    def to_string(
        self, tokens: "torch.Tensor | Sequence[int] | Sequence[torch.Tensor] | int"
    ) -> str | list[str]:
        """The text of ids [position], or of each row of ids [batch, position]."""
        ids = _plain(tokens)
        if ids and isinstance(ids[0], list):
            return [self._decode(row) for row in ids]
        return self._decode(ids)

    def to_str_tokens(self, text: Any, *, prepend_bos: bool | None = None) -> Any:
        """The pieces of one text, or of ids [position], each as text; of each in a list of these, a list of lists.

        Raises:
            TokensError: there are several rows of ids.
        """
        if isinstance(text, list | tuple) and any(_is_row(item) for item in text):
            return [self.to_str_tokens(item, prepend_bos=prepend_bos) for item in text]
        if isinstance(text, str):
            ids = self.to_tokens(text, prepend_bos=prepend_bos)[0][0].tolist()
        else:
            # As in TransformerLens, axes of size 1 do not count.
            ids = _plain(text.squeeze() if hasattr(text, "squeeze") else text)
            if ids and isinstance(ids[0], list):
                raise NoSuchTokenError(
                    f"pieces are those of one row, and there are {len(ids)}; give one, or a list of rows"
                )
        return [self._decode([token]) for token in ids]

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
            NoSuchTokenError: the text is not one token; the message shows the tokens.
        """
        if not isinstance(text, str):
            raise TokensError(f"expected a text of one token, found {quoted(text)}")
        check_unicode(text)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = " + ".join(repr(self._decode([token])) for token in ids) or "nothing"
            raise NoSuchTokenError(
                f"{text!r} is {len(ids)} tokens of {_name(self.tokenizer)}, not one: {pieces}; words inside of a "
                "text begin with a space"
            )
        return int(ids[0])

    def get_token_position(
        self,
        token: str | int,
        text: "str | torch.Tensor",
        *,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """The position of a token in a text or in ids [position], the first or the last one.

        Raises:
            NoSuchTokenError: the token is not there.
        """
        if not isinstance(text, str) and not hasattr(text, "squeeze"):
            raise TokensError(f"a position is looked for in one text or in ids, found {type(text).__name__}")
        ids = (
            self.to_tokens(text, prepend_bos=prepend_bos)[0][0] if isinstance(text, str) else text.squeeze(0)
        )
        if mode not in ("first", "last"):
            raise TokensError(f"mode is {mode!r}; choose 'first' or 'last'")
        if ids.ndim != 1:
            raise TokensError(f"a position is looked for in one row, found ids of shape {tuple(ids.shape)}")
        wanted = self.to_single_token(token) if isinstance(token, str) else int(token)
        places = [place for place, token_id in enumerate(ids.tolist()) if token_id == wanted]
        if not places:
            raise NoSuchTokenError(
                f"token {token!r} is not in {' + '.join(map(repr, self.to_str_tokens(ids)))}"
            )
        return places[0 if mode == "first" else -1]

    def _begin(self, prepend_bos: bool | None) -> list[int]:
        wanted = self.prepend_bos if prepend_bos is None else prepend_bos
        if not wanted:
            return []
        if self.tokenizer.bos_token_id is None:
            raise TokensError(
                f"{_name(self.tokenizer)} has no BOS token to prepend; choose prepend_bos=False"
            )
        return [int(self.tokenizer.bos_token_id)]

    def _pad_id(self) -> int:
        """The id to pad with: any id will do, since padding is masked."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in candidates if token is not None)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _is_row(given: Any) -> bool:
    """Whether this is a text, or ids in a row of their own, and not one id."""
    return isinstance(given, str | list | tuple) or bool(getattr(given, "ndim", 0))


def _plain(tokens: Any) -> Any:
    """Ids [position] or [batch, position], or one id, as lists of integers.

    Raises:
        TokensError: an entry is not a token id.
    """
    given = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    ids = given if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]
    # Single ids, and rows of them, can be tensors.
    ids = [item.tolist() if hasattr(item, "tolist") else item for item in ids]
    rows = ids if ids and all(isinstance(row, list | tuple) for row in ids) else [ids]
    for token in (token for row in rows for token in row):
        is_id = isinstance(token, Integral) and not isinstance(token, bool)
        if not is_id or not 0 <= int(token) < 2**31:
            raise TokensError(f"expected token ids, found {quoted(tokens)}")
    return [[int(token) for token in row] for row in rows] if rows is ids else [int(token) for token in ids]


def _name(tokenizer: Any) -> str:
    return f"the tokenizer {tokenizer.name_or_path}" if tokenizer.name_or_path else "this tokenizer"
