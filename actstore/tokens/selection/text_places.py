"""Finding where the tokens of a document go on behind a text."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from actstore.errors import TokensError
from actstore.tokens.batch import TextBatch
from actstore.tokens.column import Kind
from actstore.tokens.files import SourceFile
from actstore.tokens.keeping.row_taker import RowTaker
from actstore.tokens.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextPlaces:
    """A source of text that also notes, while it is read, where its documents go on behind a text."""

    def __init__(self, source: Source, tokenizer: "PreTrainedTokenizerBase | None", text: str) -> None:
        """
        Args:
            source: source of text.
            tokenizer: tokenizer that its documents are encoded with.
            text: text to find, in each document the last place with it.

        Raises:
            TokensError: the source has no text, or the tokenizer does not say which characters a token stands for.
        """
        if source.kind != "text" or tokenizer is None:
            raise TokensError(
                f"positions 'after:{text}' need text, and {source.files[0].url} has "
                f"{'chats' if source.kind == 'chats' else 'token ids'}; choose other positions"
            )
        if not tokenizer.is_fast:
            raise TokensError(
                f"positions 'after:{text}' need a tokenizer that says which characters a token stands for, and "
                f"{tokenizer.name_or_path} is a slow one, which does not; choose other positions"
            )
        self._source = source
        self._tokenizer = tokenizer
        self._text = text
        self.starts: dict[int, int] = {}
        """By document, the index of its first token with a character behind the text. Documents without the text, or
        that end with it, are missing.
        """

    @property
    def kind(self) -> Kind:
        return self._source.kind

    @property
    def files(self) -> tuple[SourceFile, ...]:
        return self._source.files

    @property
    def column(self) -> str | None:
        return self._source.column

    @property
    def keep(self) -> tuple[str, ...]:
        return self._source.keep

    def batches(self, kept: RowTaker | None = None) -> Iterator[TextBatch]:
        """The batches of the source, noted before they are given."""
        for first, documents in self._source.batches(kept):
            self._note(first, [document for document in documents if isinstance(document, str)])
            yield first, documents  # type: ignore[misc]

    def forget_before(self, document: int) -> None:
        """Forget documents that are packed, so that memory stays bounded."""
        self.starts = {number: start for number, start in self.starts.items() if number >= document}

    def _note(self, first: int, texts: list[str]) -> None:
        ends = {
            number: place + len(self._text)
            for number, text in enumerate(texts, first)
            if (place := text.rfind(self._text)) >= 0
        }
        if not ends:
            return
        encoded = self._tokenizer(
            [texts[number - first] for number in ends],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for (number, end), spans in zip(ends.items(), encoded["offset_mapping"], strict=True):
            start = next((index for index, (_, stop) in enumerate(spans) if stop > end), None)
            if start is not None:
                self.starts[number] = start
