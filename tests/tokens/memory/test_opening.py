"""Prompts in memory: one source from every form, and one sentence for what is no prompt."""

import hashlib
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import TokensError
from actstore.tokens import MemorySource, open_memory

TEXTS = ["My lord", "", "naïve 漢字 🙂", "My lord", "line\nfeed\0"]
IDS = [[5, 6, 7], [8], [5, 6, 7], [], [9, 2**31 - 1]]
EVEN = [[1, 2, 3], [4, 5, 6]]


def documents(source: MemorySource) -> list[Any]:
    """All documents, which are numbered without gaps."""
    found: list[Any] = []
    for first, batch in source.batches():
        assert first == len(found)
        found += [item.tolist() if isinstance(item, np.ndarray) else item for item in batch]
    return found


def stream_of(rows: list[dict[str, Any]]) -> datasets.IterableDataset:
    def records() -> Iterator[dict[str, Any]]:
        yield from rows

    return datasets.IterableDataset.from_generator(records)


TEXT_FORMS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "generator": iter,
    "array of objects": lambda texts: np.array(texts, object),
    "array of text": lambda texts: pa.chunked_array([pa.array(texts[:2]), pa.array(texts[2:])]),
    "pandas": lambda texts: pd.DataFrame({"label": range(len(texts)), "text": texts}),
    "pandas of objects": lambda texts: pd.DataFrame(
        {"text": np.array(texts, object)}, index=list("edcba"), dtype=object
    ),
    "column of pandas": lambda texts: pd.Series(texts, name="prompt"),
    "arrow": lambda texts: pa.table({"text": texts}),
    "dictionary of arrow": lambda texts: pa.table({"text": pa.array(texts).dictionary_encode()}),
    "record batch": lambda texts: pa.record_batch({"text": pa.array(texts)}),
    "data set": lambda texts: datasets.Dataset.from_dict({"n": [0] * len(texts), "text": texts}),
    "column of a data set": lambda texts: datasets.Dataset.from_dict({"text": texts})["text"],
    "shuffled data set": lambda texts: datasets.Dataset.from_dict({"text": texts[::-1]}).select(
        range(len(texts) - 1, -1, -1)
    ),
    "stream": lambda texts: stream_of([{"text": text} for text in texts]),
}
ID_FORMS: dict[str, Any] = {
    "list": list,
    "tuples": lambda rows: tuple(map(tuple, rows)),
    "generator": iter,
    "arrays": lambda rows: [np.array(row, np.uint32) for row in rows],
    "tensors": lambda rows: [torch.tensor(row, dtype=torch.int64) for row in rows],
    "pandas": lambda rows: pd.DataFrame({"input_ids": rows}),
    "arrow": lambda rows: pa.table({"tokens": pa.array(rows, pa.list_(pa.int64()))}),
    "data set": lambda rows: datasets.Dataset.from_dict({"input_ids": rows}),
    "torch data set": lambda rows: datasets.Dataset.from_dict({"input_ids": rows}).with_format("torch"),
    "stream": lambda rows: stream_of([{"input_ids": row} for row in rows]),
    "what a tokenizer returns": lambda rows: {
        "input_ids": rows,
        "attention_mask": [[1] * len(row) for row in rows],
    },
    "ids without masks": lambda rows: {"input_ids": rows},
}
EVEN_FORMS: dict[str, Any] = {
    "array": np.array,
    "array of bytes": lambda rows: np.array(rows, np.uint8),
    "tensor": torch.tensor,
    "tensor with a graph's other order": lambda rows: torch.tensor(rows).T.contiguous().T,
    "several tensors": lambda rows: [torch.tensor(row)[None] for row in rows],
    "array of arrow": lambda rows: pa.array(rows, pa.list_(pa.int32(), 3)),
}


@pytest.mark.parametrize("form", TEXT_FORMS)
def test_text_in_any_form_is_the_same_source(form: str) -> None:
    source = open_memory(TEXT_FORMS[form](TEXTS))
    assert source.kind == "text"
    assert source.n_documents == len(TEXTS)
    assert documents(source) == documents(source) == TEXTS  # it can be read again
    assert source.url == open_memory(TEXTS).url


@pytest.mark.parametrize("form", ID_FORMS)
def test_ids_in_any_form_are_the_same_source(form: str) -> None:
    source = open_memory(ID_FORMS[form](IDS))
    assert source.kind == "tokens"
    assert documents(source) == documents(source) == IDS
    assert source.url == open_memory(IDS).url


@pytest.mark.parametrize("form", EVEN_FORMS)
def test_rows_of_one_length_are_the_same_source(form: str) -> None:
    source = open_memory(EVEN_FORMS[form](EVEN))
    assert documents(source) == EVEN
    assert source.url == open_memory(EVEN).url


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=20))
def test_the_name_of_a_source_is_the_hash_that_the_format_defines(texts: list[str]) -> None:
    digest = hashlib.sha256(b"text\0")
    for text in texts:
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    source = open_memory(texts)
    assert source.url == f"memory:{digest.hexdigest()}"
    assert source.files[0].nbytes == sum(len(text.encode()) for text in texts)
    assert open_memory([*texts, ""]).url != source.url


def test_numpy_arrays_of_texts_and_of_rows_of_several_lengths() -> None:
    """What ``frame["text"].to_numpy()`` gives."""
    assert documents(open_memory(np.array(["My lord", "Ha!"]))) == ["My lord", "Ha!"]
    rows = np.empty(2, object)
    rows[:] = [[5, 6, 7], [8]]
    assert documents(open_memory(rows)) == [[5, 6, 7], [8]]
    with pytest.raises(TokensError, match=r"prompt 1 is None; leave it out"):
        open_memory(np.array(["My lord", None], object))


def test_the_hash_of_ids() -> None:
    digest = hashlib.sha256(b"tokens\0")
    for row in IDS:
        digest.update((4 * len(row)).to_bytes(8, "little") + np.array(row, "<i4").tobytes())
    assert open_memory(IDS).url == f"memory:{digest.hexdigest()}"


PADDED = {
    "input_ids": [[5, 6, 0], [7, 0, 0], [8, 9, 10]],
    "attention_mask": [[1, 1, 0], [1, 0, 0], [1, 1, 1]],
}
MASKED_FORMS: dict[str, Any] = {
    "lists": dict,
    "tensors": lambda given: {name: torch.tensor(rows) for name, rows in given.items()},
    "data set": datasets.Dataset.from_dict,
    "arrow": pa.table,
    "pandas": pd.DataFrame,
    "stream": lambda given: stream_of(
        [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
    ),
}


@pytest.mark.parametrize("form", MASKED_FORMS)
def test_a_mask_takes_padding_away(form: str) -> None:
    assert documents(open_memory(MASKED_FORMS[form](PADDED))) == [[5, 6], [7], [8, 9, 10]]


@pytest.mark.parametrize("form", MASKED_FORMS)
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([0, 1, 1], "padded on the left, and sequences are padded on the right.*padding_side = 'right'"),
        ([1, 0, 1], "padded on the left"),
        ([1, 2, 1], "has other values than 1 \\(a token\\) and 0 \\(padding\\)"),
    ],
)
def test_a_mask_that_is_no_padding_on_the_right_is_refused(form: str, mask: list[int], message: str) -> None:
    wrong = PADDED | {"attention_mask": [[1, 1, 0], mask, [1, 1, 1]]}
    with pytest.raises(TokensError, match=f"row 1 of .*{message}"):
        open_memory(MASKED_FORMS[form](wrong))


def test_a_tensor_is_taken_as_it_is() -> None:
    """Nobody can tell padding from tokens without a mask."""
    assert documents(open_memory(torch.tensor([[5, 0, 0]]))) == [[5, 0, 0]]


WRONG: dict[str, tuple[Any, str]] = {
    "empty list": ([], "tokens is a list without any prompt; give at least one"),
    "empty generator": (iter(()), "without any prompt"),
    "empty tensor": (
        torch.zeros((0, 4), dtype=torch.int64),
        r"a Tensor of shape \(0, 4\) without any prompt",
    ),
    "empty table": (pd.DataFrame({"text": pd.Series([], dtype=str)}), "without any prompt"),
    "empty stream": (stream_of([]), "without any prompt"),
    "None": (["a", None], "prompt 1 is None; leave it out, or give the text ''"),
    "a number": (["a", "b", 3], "prompt 2 is the number 3"),
    "one flat list": ([1, 2, 3], r"prompt 0 is the number 1, .* is given as \[\[1, 2, 3\]\]"),
    "text among ids": ([[1], "a"], "prompt 1 is text, and the prompts before are token ids"),
    "ids among text": (["a", [1]], "prompt 1 is token ids, and the prompts before are text"),
    "ids among text, one pass": (iter(["a", [1]]), "prompt 1 is token ids"),
    "words": ([["My", "lord"]], "prompt 0 is a list of texts, and a prompt is one text"),
    "one chat": (
        [{"role": "user", "content": "a"}],
        "prompt 0 is a single message, .* a chat is a list of messages",
    ),
    "text among chats": ([[{"role": "user", "content": "a"}], "b"], "prompt 1 is text, .* before are chats"),
    "role": ([[{"role": "king", "content": "a"}]], "the role of message 0 of prompt 0 is 'king'"),
    "half a pair": (["a", "\ud800"], "prompt 1 has half a surrogate pair at character 0"),
    "float tensor": (torch.zeros(2, 3), "row 0 of tokens holds float32, and token ids are integers"),
    "bfloat16 tensor": (torch.zeros(2, 3, dtype=torch.bfloat16), "token ids are integers"),
    "float ids": ([[1, 2], [1.5]], "prompt 1 holds float64, and token ids are integers"),
    "boolean ids": ([[True, False]], "prompt 0 holds bool, and token ids are integers"),
    "None in ids": ([[1, None]], "prompt 0 is not a flat list of token ids"),
    "nested ids": ([[[1, 2], [3]]], "prompt 0 is not a flat list of token ids"),
    "deep tensor": (torch.zeros(1, 2, 3, dtype=torch.int64), r"array of shape \(1, 2, 3\); give token ids"),
    "negative id": (
        np.array([[1, -1]]),
        "row 0 of tokens has the token id -1, and token ids are 0 to 2147483647",
    ),
    "large id": ([[2**31]], "prompt 0 has the token id 2147483648"),
    "larger id": ([[2**70]], "prompt 0"),
    "a dict": ({"text": ["a"]}, "tokens is the dict; give a path, a list of texts, of token ids or of chats"),
    "a set": ({"a", "b"}, "tokens is the set; give a list"),
    "bytes": (b"text", "tokens is the bytes; give a list"),
    "an object": (object(), "tokens is the object; give a path"),
    "splits": (
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}),
        "holds the splits train; give one of them",
    ),
    "no column": (
        pd.DataFrame({"prompt": ["a"]}),
        "no column input_ids or tokens .* text .*: prompt \\(",
    ),
    "column of numbers": (pa.table({"text": [1, 2]}), "column text of .* does not hold strings; mend it"),
    "several types": (pd.DataFrame({"text": ["a"] * 1500 + [5]}), "column text of .* several types"),
    "columns of one name": (
        pd.DataFrame([["a", "b"]], columns=["text", "text"]),
        "several columns named text; give each a name of its own",
    ),
    "one row of a tokenizer": ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "are one row; give rows"),
    "masks of another number": ({"input_ids": [[1], [2]], "attention_mask": [[1]]}, "2 rows .* and 1 of"),
    "mask of another length": (
        {"input_ids": [[1]], "attention_mask": [[1, 1]]},
        r"1 token ids and an attention_mask",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_prompt_is_told_in_one_sentence(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(TokensError, match=message) as caught:
        open_memory(given)
    assert "\n" not in str(caught.value)


def test_a_column_is_chosen_by_name() -> None:
    table = pd.DataFrame({"text": ["a"], "prompt": ["b"]})
    assert documents(open_memory(table, column="prompt")) == ["b"]
    with pytest.raises(TokensError, match="no column body; its columns are: text .*, prompt"):
        open_memory(table, column="body")
    with pytest.raises(TokensError, match="column text is requested, but a list has no columns"):
        open_memory(["a"], column="text")


def test_no_more_of_a_generator_is_read_than_is_needed() -> None:
    def endless() -> Iterator[str]:
        number = 0
        while True:
            yield f"prompt {number}"
            number += 1

    assert documents(open_memory(endless(), max_documents=3)) == ["prompt 0", "prompt 1", "prompt 2"]
    records = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in endless()))
    assert documents(open_memory(records, max_documents=2)) == ["prompt 0", "prompt 1"]


def test_a_generator_takes_little_memory() -> None:
    n, text = 40_000, "x" * 1000  # 40 MB

    def texts() -> Iterator[str]:
        return (f"{number} {text}" for number in range(n))

    tracemalloc.start()
    try:
        source = open_memory(texts())
        n_read = sum(len(batch) for _, batch in source.batches())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_read == n
    assert peak < 20e6


def test_libraries_are_not_imported_to_look_whether_something_is_theirs() -> None:
    code = (
        "import sys; from actstore.tokens import open_memory; open_memory(['a']); open_memory([[1, 2]]);"
        "print([name for name in ('torch', 'pandas', 'polars', 'datasets', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
