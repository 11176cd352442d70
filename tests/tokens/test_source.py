"""What open_source accepts and refuses, and the way from files to rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actstore.errors import TokensError
from actstore.tokens import Packing, encode_documents, open_source, pack, spool, token_documents


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.txt", {"documents": "word"}, "documents is 'word'; choose file, paragraph or line"),
        ("a.txt", {"column": "text"}, "column text is requested, but .*a.txt is plain text without columns"),
        (
            "a.jsonl",
            {"documents": "line"},
            "documents='line' splits plain text, but .*a.jsonl is a jsonl file",
        ),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, name: str, options: Any, message: str) -> None:
    (tmp_path / name).write_text('{"text": "a"}')
    with pytest.raises(TokensError, match=message):
        open_source(f"{tmp_path}/{name}", **options)


def test_the_same_text_gives_the_same_rows_from_every_format(
    tmp_path: Path, tokenizer: Any, play: str
) -> None:
    texts = play.split("\n\n")
    ids = [ids.tolist() for ids in encode_documents(tokenizer, texts)]
    (tmp_path / "a.txt").write_text(play)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"input_ids": ids}), tmp_path / "b.parquet")
    packing = Packing(context_length=32, begin_batch=0, separator=0)
    hashes = set()
    for name, unit in (("a.txt", "paragraph"), ("a.parquet", "file"), ("b.parquet", "file")):
        source = open_source(f"{tmp_path}/{name}", documents=unit)  # type: ignore[arg-type]
        rows = pack(token_documents(source, tokenizer), packing, vocab_size=len(tokenizer))
        spooled = spool(rows, tmp_path / f"{name}.rows")
        hashes.add(spooled.sha256)
        assert spooled.n_documents == len(texts)
        valid = np.argwhere(spooled.documents >= 0)
        for row, column in valid[:: len(valid) // 50]:
            document, offset = spooled.documents[row, column], spooled.offsets[row, column]
            assert spooled.tokens[row, column] == ids[document][offset]
    assert len(hashes) == 1


def test_a_source_of_nothing_fails_in_the_packer(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("")
    documents = token_documents(open_source(f"{tmp_path}/a.txt"), tokenizer)
    with pytest.raises(
        TokensError, match="the source has nothing to pack: there is no token in its 1 document"
    ):
        list(pack(documents, Packing(context_length=8)))
