"""Stores of one text under two tokenizers, aligned by characters: compared with offsets of the text itself."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import actstore
from actstore.analysis.alignment import align
from actstore.errors import LoaderError
from actstore.pairing import aligned, paired
from tests.conftest import TinyModel
from tests.tokens.conftest import train

HOOK = "blocks.0.hook_resid_post"
TEXTS = [
    "The ghost of my father walks the night, and the watch is afraid.",
    "naïve café 👻 ghosts — “speak!” said Horatio to the ghost 👩‍👩‍👧",
    "   spaces   and\n\nlines\t and the\u00a0rest   ",
    "",
    "x",
    "Who goes there? I am thy father's spirit, doomed for a certain term to walk the night number nine. ",
]


@pytest.fixture(scope="module")
def models(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of different families and tokenizers."""
    first, other = tiny_model("llama"), tmp_path_factory.mktemp("other")
    for file in tiny_model("gpt2", vocab_size=600).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    train(400).save_pretrained(other)
    return first, other


def extract(model: Path, folder: Path, texts: list[str], name: str, **fields: Any) -> actstore.Store:
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings: dict[str, Any] = {"context_length": 16, "batch_size": 4, "begin_batch_token": "bos"}
    fields = settings | fields
    actstore.extract(
        actstore.plan(model=str(model), tokens=str(source), hooks=HOOK, out=str(folder / name), **fields)
    )
    return actstore.open(str(folder / name))


def ends_by_row(store: actstore.Store, texts: list[str]) -> dict[tuple[int, int], tuple[int, int]]:
    """(document, character) of the end of each token, by (sequence, position), from the text itself."""
    tokenizer = AutoTokenizer.from_pretrained(store.plan.request.model.name)
    offsets = [
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for text in texts
    ]
    documents, places = store.documents[:], store.offsets[:]
    return {
        (row, position): (
            int(documents[row, position]),
            offsets[documents[row, position]][places[row, position]][1],
        )
        for row, position in zip(*np.nonzero(documents >= 0), strict=True)
    }


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_pairs_end_at_one_character(models: tuple[Path, Path], tmp_path: Path, packing: str) -> None:
    length = {"context_length": 128} if packing == "document" else {"context_length": 16}
    fields: dict[str, Any] = {"packing": packing, "pad_token": 0, **length}
    if packing == "concat":
        del fields["pad_token"]
    first = extract(models[0], tmp_path, TEXTS, "first", **fields)
    other = extract(models[1], tmp_path, TEXTS, "other", **fields)
    ours, theirs = ends_by_row(first, TEXTS), ends_by_row(other, TEXTS)
    common = set(ours.values()) & set(theirs.values())

    with aligned(
        (first, HOOK), (other, HOOK), batch_size=7, provenance=True, shuffle="global", seed=3
    ) as loader:
        seen = []
        for left, right in cast(Any, loader):
            for here, there in zip(
                zip(left.sequences.tolist(), left.positions.tolist(), strict=True),
                zip(right.sequences.tolist(), right.positions.tolist(), strict=True),
                strict=True,
            ):
                assert ours[here] == theirs[there]
                seen.append(ours[here])
        assert len(seen) == len(set(seen)) == loader.n_rows
        # The last document of packed text can end within a character, or lack the end in one of the stores.
        assert set(seen) == common
        assert loader.n_left_out == 0


def test_state_goes_on(models: tuple[Path, Path], tmp_path: Path) -> None:
    stores = [extract(model, tmp_path, TEXTS, str(i)) for i, model in enumerate(models)]
    with aligned(*((store, HOOK) for store in stores), batch_size=9, seed=1) as loader:
        next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = next(loader)
    with aligned(*((store, HOOK) for store in stores), batch_size=9, seed=1) as again:
        again.load_state_dict(state)
        for left, right in zip(expected, next(again), strict=True):
            assert cast(torch.Tensor, left).equal(cast(torch.Tensor, right))
        with pytest.raises(LoaderError, match="not the state of an aligned loader"):
            again.load_state_dict({"epoch": 0, "batch": 1})


def test_every_token_is_its_own_partner(models: tuple[Path, Path], tmp_path: Path) -> None:
    texts = [text for text in TEXTS if text.isascii()]  # parts of a character share its end
    store = extract(models[0], tmp_path, texts, "first")
    alignment = align(store, store)
    for mask in alignment.masks:
        assert (mask == (store.documents[:] >= 0)).all()


def test_base_and_changed_copy(models: tuple[Path, Path], tmp_path: Path) -> None:
    changed = AutoModelForCausalLM.from_pretrained(models[0])
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    changed.save_pretrained(tmp_path / "changed")
    AutoTokenizer.from_pretrained(models[0]).save_pretrained(tmp_path / "changed")
    base = extract(models[0], tmp_path, TEXTS, "base")
    copy = extract(tmp_path / "changed", tmp_path, TEXTS, "copy")
    tokens = torch.from_numpy(base.tokens[:]).long()
    with torch.no_grad():
        whole = [
            AutoModelForCausalLM.from_pretrained(folder)(tokens, output_hidden_states=True).hidden_states[1]
            for folder in (models[0], tmp_path / "changed")
        ]
    assert not torch.allclose(whole[0], whole[1], atol=1e-2)
    for pair in (
        paired([(base, HOOK), (copy, HOOK)], batch_size=32, provenance=True),
        aligned((base, HOOK), (copy, HOOK), batch_size=32, provenance=True),
    ):
        with pair:
            left, right = cast(Any, next(pair))
            assert left.sequences.equal(right.sequences)
            for batch, values in zip((left, right), whole, strict=True):
                torch.testing.assert_close(
                    batch.values, values[batch.sequences, batch.positions], atol=1e-5, rtol=1e-4
                )


def test_other_text_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    first = extract(models[0], tmp_path, TEXTS, "first")
    other = extract(models[1], tmp_path, ["Other: " + text for text in TEXTS], "other")
    with pytest.raises(LoaderError, match="cannot be aligned by characters"):
        aligned((first, HOOK), (other, HOOK), batch_size=4)


def test_document_with_other_text_is_left_out(models: tuple[Path, Path], tmp_path: Path) -> None:
    first = extract(models[0], tmp_path, TEXTS, "first")
    other = extract(models[1], tmp_path, [TEXTS[0], "Something else entirely", *TEXTS[2:]], "other")
    with aligned((first, HOOK), (other, HOOK), provenance=True, batch_size=1000) as loader:
        assert loader.n_left_out == 1
        left, _ = cast(Any, next(loader))
        documents = first.documents[:][left.sequences.numpy(), left.positions.numpy()]
        assert 1 not in documents
        assert {0, 2}.issubset(documents.tolist())


def test_shuffled_store_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    first = extract(models[0], tmp_path, TEXTS, "first", seed=5)
    other = extract(models[1], tmp_path, TEXTS, "other")
    with pytest.raises(LoaderError, match="not in the order of their source"):
        aligned((first, HOOK), (other, HOOK), batch_size=4)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"drop": ["bos"]}, "drop would drop"), ({"shuffle": "window"}, "depends on the shards")],
)
def test_impossible_options(
    models: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    first = extract(models[0], tmp_path, TEXTS, "first")
    with pytest.raises(LoaderError, match=says):
        aligned((first, HOOK), (first, HOOK), batch_size=4, **options)


def test_pairs_of_other_tokens_name_this(models: tuple[Path, Path], tmp_path: Path) -> None:
    first = extract(models[0], tmp_path, TEXTS, "first")
    other = extract(models[1], tmp_path, TEXTS, "other")
    with pytest.raises(LoaderError, match=r"actstore\.pairing\.aligned"):
        paired([(first, HOOK), (other, HOOK)], batch_size=4)
