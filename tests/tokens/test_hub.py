"""Hub datasets: specs, the adapter over a local dataset, and failures."""

import sys
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pytest

from actstore.errors import MissingExtraError, TokensError
from actstore.tokens import open_source
from actstore.tokens.hub import HubName, HubSource
from tests.commands import command

TEXTS = ["one", None, "", *(f"text {i}" for i in range(3000))]
IDS = [[1, 2], [], [3], *([i] for i in range(3000))]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("hf:org/name", HubName("org/name", None, "train")),
        ("hf:name", HubName("name", None, "train")),
        ("hf:org/name:test", HubName("org/name", None, "test")),
        ("hf:org/name:en", HubName("org/name", "en", "train")),
        ("hf:org/name:en:validation", HubName("org/name", "en", "validation")),
        ("hf:org/name::odd", HubName("org/name", None, "odd")),
        ("hf:org/name:train:train", HubName("org/name", "train", "train")),
    ],
)
def test_specs(spec: str, name: HubName) -> None:
    assert HubName.parse(spec) == name
    assert HubName.parse(str(name)) == name


@pytest.mark.parametrize("spec", ["hf:", "hf:org/name:a:b:c", "hf:org/name:train[1:2]:x"])
def test_other_specs_are_refused(spec: str) -> None:
    with pytest.raises(TokensError, match="is not a dataset name; give hf:org/name"):
        open_source(spec)


def read(source: HubSource) -> list[Any]:
    documents: list[Any] = []
    for first, batch in source.batches():
        assert first == len(documents)
        documents += [
            document.tolist() if isinstance(document, np.ndarray) else document for document in batch
        ]
    return documents


def test_the_adapter_reads_text_and_ids() -> None:
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "input_ids": IDS}).to_iterable_dataset()
    source = HubSource(dataset, "hf:a/b", None)
    assert (source.kind, source.column) == ("tokens", "input_ids")
    assert source.files[0].url == "hf:a/b"
    assert read(source) == IDS
    assert read(source) == IDS
    source = HubSource(dataset, "hf:a/b", "text")
    assert source.kind == "text"
    assert read(source) == [text or "" for text in TEXTS]


def test_the_adapter_reads_a_dataset_without_known_features() -> None:
    def generate() -> Iterator[dict[str, Any]]:
        yield from ({"text": text, "ids": ids} for text, ids in zip(TEXTS, IDS, strict=True))

    dataset = datasets.IterableDataset.from_generator(generate)
    assert dataset.features is None
    assert read(HubSource(dataset, "hf:a/b", None)) == [text or "" for text in TEXTS]
    assert read(HubSource(dataset, "hf:a/b", "ids")) == IDS


def test_the_adapter_names_a_missing_column_and_a_failure_below() -> None:
    dataset = datasets.Dataset.from_dict({"body": ["a"]}).to_iterable_dataset()
    with pytest.raises(TokensError, match=r"hf:a/b has no column input_ids .*: body \(string\)"):
        HubSource(dataset, "hf:a/b", None)

    def fail() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionError("the line is dead\nreally")

    features = datasets.Features({"text": datasets.Value("string")})
    source = HubSource(datasets.IterableDataset.from_generator(fail, features=features), "hf:a/b", None)
    with pytest.raises(TokensError, match="hf:a/b cannot be read: ") as caught:
        list(source.batches())
    assert "\n" not in str(caught.value)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingExtraError, match=r"hf:org/name needs the package datasets, .* 'actstore\[hf\]'"
    ):
        open_source("hf:org/name")


def test_without_a_network_it_is_one_sentence() -> None:
    code = "from actstore.tokens import open_source; open_source('hf:no-such/data:en:test')"
    done = command(code=code)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("actstore.errors.TokensError: hf:no-such/data:en:test cannot be opened: ")
