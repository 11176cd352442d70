"""Grouping documents in batches that keep a tokenizer's threads busy and bound memory."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
Document = TypeVar("Document", bound=Sized)

TextBatch = tuple[int, list[str]]
TokenBatch = tuple[int, list[TokenIds]]
"""The number of the first document, and the documents from there on, without gaps."""

MAX_DOCUMENT_NBYTES = 256 << 20
"""The most bytes of text in one document. A tokenizer takes some fifty times as much memory."""
BATCH_DOCUMENTS = 4096
BATCH_SIZE = 1 << 20
"""Characters or tokens in a batch; a longer document is a batch by itself."""


def in_batches(documents: Iterable[Document]) -> Iterator[tuple[int, list[Document]]]:
    """Number documents from 0 and group them; every document has its number, empty ones too."""
    first, size = 0, 0
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_SIZE or len(batch) == BATCH_DOCUMENTS:
            yield first, batch
            first, size, batch = first + len(batch), 0, []
    if batch:
        yield first, batch
