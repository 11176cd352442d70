"""Every pair is checked before there is work to lose, and what is wrong is told with its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actstore import patching
from actstore.errors import PatchError, TokensError
from actstore.hooks.model import HookedModel
from tests.patching.jobs.pairs_file import write_jsonl

TinyModel = Callable[..., Path]
IDS = {"clean": [5, 6, 7], "corrupted": [5, 8, 7], "answer": 9, "wrong": 10}


def plan(tiny_model: TinyModel, folder: Path, *pairs: dict[str, Any], **fields: Any) -> Any:
    source = write_jsonl(folder / "pairs.jsonl", pairs)
    job = {"model": str(tiny_model("llama")), "pairs": source, "out": str(folder / "out")}
    return patching.plan_job(**job | fields)


def test_text_and_ids_in_jsonl_and_parquet_are_the_same_pairs(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    text = {"clean": "the king 1", "corrupted": "the king 2", "answer": "a", "wrong": "b"}
    ids: dict[str, Any] = {name: model.to_tokens(text[name])[0].tolist() for name in ("clean", "corrupted")}
    ids |= {name: model.to_single_token(text[name]) for name in ("answer", "wrong")}
    by_text = plan(tiny_model, tmp_path, text, IDS)
    by_ids = plan(tiny_model, tmp_path, ids | {"answer": [ids["answer"]]}, IDS)
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([ids, IDS]), path)
    by_table = plan(tiny_model, tmp_path, pairs=str(path))
    assert by_text.plan.pairs_sha256 == by_ids.plan.pairs_sha256 == by_table.plan.pairs_sha256
    assert by_text.pairs.prompts(0)[0].tolist() == ids["clean"]
    assert by_text.pairs.prompts(1)[1].tolist() == [5, 8, 7]
    without = plan(tiny_model, tmp_path, text, IDS, prepend_bos=False)
    assert without.pairs.prompts(0)[0].tolist() == ids["clean"][1:]
    assert without.pairs.prompts(1)[0].tolist() == [5, 6, 7]  # ids are taken as they are
    table = pq.read_table(pa.BufferReader(by_text.pairs.to_parquet())).to_pylist()
    assert table[0] == {"pair": 0} | ids
    assert plan(tiny_model, tmp_path, text, IDS, limit=1).plan.n_pairs == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"clean": [5, 6]},
            "clean has 2 tokens and corrupted has 3; choose prompts with as many tokens",
        ),
        ({"corrupted": [5, 6, 7]}, "clean and corrupted are the same tokens"),
        ({"clean": [5, 300, 7]}, "clean holds 300, which is no token id of this model; ids are 0 to 299"),
        ({"clean": [5, True, 7]}, "clean holds True, which is no token id"),
        ({"clean": 5}, "clean is 5; give text, or a list of token ids"),
        ({"clean": [], "corrupted": []}, r"clean is \[\]; give text"),
        ({"clean": list(range(2, 202))}, "clean has 200 tokens and corrupted has 3"),
        (
            {"clean": list(range(2, 202)), "corrupted": list(range(3, 203))},
            "the prompts have 200 tokens, and the model is made for 128",
        ),
        ({"answer": None}, "answer is missing, there is clean, corrupted, wrong; give it"),
        ({"wrong": None}, "wrong is missing, .* or choose a metric of answer alone, such as logit"),
        ({"answer": "two words"}, "answer: 'two words' is .* tokens of .*, not one"),
        ({"answer": 10}, "answer and wrong are the same token 10"),
        ({"answer": [9, 9]}, r"answer holds \[9, 9\], which is no token id"),
    ],
)
def test_a_wrong_pair_is_told_with_its_line(
    tiny_model: TinyModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(PatchError, match=rf"^line 2 of \S+pairs\.jsonl: {message}"):
        plan(tiny_model, tmp_path, IDS, IDS | change)
    assert not (tmp_path / "out").exists()


def test_all_wrong_pairs_are_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    wrong = IDS | {"answer": 10}
    with pytest.raises(PatchError) as caught:
        plan(tiny_model, tmp_path, wrong, IDS, *[wrong] * 12)
    message = str(caught.value)
    assert message.startswith("line 1 of ")
    assert "; 13 of 14 pairs are wrong, also line 3, line 4, " in message
    assert message.endswith(" and 2 more")


def test_a_position_that_a_pair_lacks(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="line 1 .*: positions holds 3, and the prompts have 3 tokens"):
        plan(tiny_model, tmp_path, IDS, positions=[0, 3])
    assert plan(tiny_model, tmp_path, IDS, positions=[0, -3]).plan.positions == (0, -3)


def test_the_axes_are_checked_before_the_model_is_loaded(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"axes is \['layer', 'head'\].* for hook_resid_pre"):
        plan(tiny_model, tmp_path, IDS, axes="layer, head")


def test_files_that_hold_no_pairs(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="holds no pairs; give one a line, with clean, corrupted"):
        plan(tiny_model, tmp_path)
    text = tmp_path / "pairs.txt"
    text.write_text("clean")
    with pytest.raises(PatchError, match="is no file of pairs; give .jsonl or .parquet"):
        plan(tiny_model, tmp_path, pairs=str(text))
    (tmp_path / "bad.jsonl").write_text("clean")
    with pytest.raises(TokensError, match="line 1 of .* is not JSON"):
        plan(tiny_model, tmp_path, pairs=str(tmp_path / "bad.jsonl"))
    table = tmp_path / "pairs.csv"
    table.write_text("clean,corrupted,answer,wrong")
    for source, advice in (
        (table, r"supported are \.jsonl/\.ndjson"),
        (tmp_path / "none.jsonl", "give a file"),
    ):
        with pytest.raises(TokensError, match=advice) as caught:
            plan(tiny_model, tmp_path, pairs=str(source))
        assert not any(wrong in str(caught.value) for wrong in (".txt", ".arrow", "hf:"))
