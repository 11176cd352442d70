"""Token sources, tokenising, packing to rows with provenance, and the spool that holds the rows.

Nothing here imports torch; transformers and datasets are imported only where a tokenizer or a hub dataset
is opened.
"""

from actstore.tokens.keeping.kept_rows import KeptRows
from actstore.tokens.memory.opening import MemorySource, open_memory
from actstore.tokens.pack import Packing, Rows, opening_token, pack
from actstore.tokens.row_stream import RowStream
from actstore.tokens.source import Source, SourceFile, chats_of, open_source
from actstore.tokens.spool import Spool, order, spool
from actstore.tokens.tokenizer import (
    encode_documents,
    load_tokenizer,
    special_id,
    token_documents,
    tokenizer_sha256,
)

__all__ = [
    "KeptRows",
    "MemorySource",
    "Packing",
    "RowStream",
    "Rows",
    "Source",
    "SourceFile",
    "Spool",
    "chats_of",
    "encode_documents",
    "load_tokenizer",
    "open_memory",
    "open_source",
    "opening_token",
    "order",
    "pack",
    "special_id",
    "spool",
    "token_documents",
    "tokenizer_sha256",
]
