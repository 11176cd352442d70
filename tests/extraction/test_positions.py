"""Stores of chosen positions, against Hugging Face run on each prompt alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import actstore
from actstore.errors import JobError, PlanMismatchError, TokensError
from actstore.extraction.claim import claim
from actstore.extraction.computing.worker import WorkerSpec
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import read_commit

TinyModel = Callable[..., Path]
Fields = dict[str, Any]
PATTERN, SCORES = "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.ln2.hook_scale", PATTERN, SCORES]
LENGTH = 24


def prompts(n: int = 61) -> list[list[int]]:
    """Token ids of prompts of 1 to 24 tokens, two of them equal."""
    rng = np.random.default_rng(0)
    some = [rng.integers(2, 290, size=1 + int(rng.integers(LENGTH))).tolist() for _ in range(n)]
    return [*some[:-1], some[3]]


@pytest.fixture
def job(tiny_model: TinyModel, tmp_path: Path) -> Fields:
    """A job over the prompts in float32, without positions."""
    source = tmp_path / "prompts.jsonl"
    # Empty documents have no sequence.
    documents = [*prompts()[:5], [], *prompts()[5:]]
    source.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    return {
        "model": str(tiny_model("llama")),
        "tokens": str(source),
        "hooks": HOOKS,
        "context_length": LENGTH,
        "packing": "document",
        "dtype": "float32",
        "batch_size": 8,
        "out": str(tmp_path / "store"),
    }


@cache
def plain_model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def alone(job: Fields, ids: list[int]) -> dict[str, torch.Tensor]:
    """Values [position, ...] of a prompt by transformers alone, without padding."""
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        output = model.eval()(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    pattern = output.attentions[1][0].movedim(0, 1)
    return {
        HOOKS[0]: output.hidden_states[1][0],
        HOOKS[1]: output.hidden_states[2][0],
        PATTERN: torch.nn.functional.pad(pattern, (0, LENGTH - len(ids))),
    }


SELECTIONS: dict[str, Callable[[int], list[int]] | None] = {
    "sample:3": None,
    "last": lambda n: [n - 1],
    "last:3": lambda n: list(range(n))[-3:],
    "2:-1": lambda n: list(range(n))[2:-1],
    "every:5": lambda n: list(range(n))[::5],
}


@pytest.mark.parametrize("positions", SELECTIONS)
def test_stored_rows_are_those_of_each_prompt_alone(job: Fields, positions: str) -> None:
    run = actstore.plan(**job, positions=positions)
    report = actstore.extract(run)
    store = actstore.open(job["out"])
    assert store.positions is not None
    choose = SELECTIONS[positions]
    if choose is None:
        expected = [[position for position in row if position >= 0] for row in store.positions[:].tolist()]
        assert [len(row) for row in expected] == [min(3, len(ids)) for ids in prompts()]
    else:
        expected = [choose(len(ids)) for ids in prompts()]
    n_slots = max(map(len, expected))
    n_rows = sum(map(len, expected))
    assert store.positions[:].tolist() == [row + [-1] * (n_slots - len(row)) for row in expected]
    assert store.counts[:].tolist() == [len(row) for row in expected]
    assert store.counts[5] == len(expected[5])
    assert (run.plan.n_slots, run.plan.n_rows, report.n_rows) == (n_slots, n_rows, n_rows)
    assert store.shape == (61, n_slots)
    assert store.tokens.shape == (61, LENGTH)
    assert store[PATTERN].shape == (61, n_slots, 4, LENGTH)
    assert store[HOOKS[0]].axes == ("sequence", "slot", "d_model")
    assert f"{positions}: {n_rows} rows of each hook" in str(run)
    assert (f"rows     {n_rows} of each hook" in str(report)) is (n_rows < report.n_tokens)
    for row, (ids, kept) in enumerate(zip(prompts(), expected, strict=True)):
        values = alone(job, ids)
        for hook in (HOOKS[0], HOOKS[1], PATTERN):
            stored = store[hook][row]
            torch.testing.assert_close(stored[: len(kept)], values[hook][kept], atol=2e-5, rtol=1e-4)
            assert not stored[len(kept) :].any()
        scores = store[SCORES][row]
        assert not scores[len(kept) :].any()
        for slot, position in enumerate(kept):
            assert torch.isinf(scores[slot, :, position + 1 :]).all()
            torch.testing.assert_close(
                scores[slot, :, : position + 1].softmax(-1),
                values[PATTERN][position, :, : position + 1],
                atol=2e-5,
                rtol=1e-4,
            )
        norms = store[HOOKS[1]].norms[row]
        np.testing.assert_allclose(
            norms[: len(kept)], values[HOOKS[1]][kept].norm(dim=-1).numpy(), rtol=1e-4, atol=1e-5
        )
        assert np.isnan(norms[len(kept) :]).all()
    statistics = store.stats(HOOKS[1])
    assert statistics.count == n_rows
    every = torch.cat([store[HOOKS[1]][row, : len(kept)] for row, kept in enumerate(expected)])
    np.testing.assert_allclose(statistics.mean, every.double().mean(0).numpy(), rtol=1e-6, atol=1e-9)
    verified = actstore.verify(job["out"], deep=True)
    assert not verified.findings


def test_whole_prompts_are_those_of_each_prompt_alone(job: Fields) -> None:
    """Without chosen positions, batches are sorted just so; behind the width of a batch are zeros."""
    actstore.extract(actstore.plan(**job))
    store = actstore.open(job["out"])
    assert store.positions is None
    assert store.counts[:].tolist() == store.lengths[:].tolist() == [len(ids) for ids in prompts()]
    for row, ids in enumerate(prompts()):
        values = alone(job, ids)
        for hook in (HOOKS[0], HOOKS[1], PATTERN):
            torch.testing.assert_close(store[hook][row, : len(ids)], values[hook], atol=2e-5, rtol=1e-4)
    shortest = min(range(61), key=lambda row: len(prompts()[row]))
    for hook in HOOKS:
        assert not store[hook][shortest, 8:].any()
    assert not actstore.verify(job["out"], deep=True).findings


def test_forwards_are_as_wide_as_they_need_to_be(job: Fields) -> None:
    run = actstore.plan(**job | {"hooks": HOOKS[:2], "positions": "last"})
    claim(run.blobs, run.plan)
    assert run.packed is not None
    run.packed.store(run.blobs, run.plan)
    worker = WorkerSpec(job["out"], job["model"]).start()
    seen: list[tuple[int, ...]] = []
    worker._model.base.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
        lambda _module, args: seen.append(tuple(args[0].shape))
    )
    done = worker.run(0)
    worker.close()
    lengths = sorted(map(len, prompts()), reverse=True)
    widths = [-(-lengths[start] // 8) * 8 for start in range(0, 61, 8)]
    assert seen == [(8, width) for width in widths]
    assert set(widths) == {8, 16, 24}
    assert (done.n_tokens, done.n_rows) == (sum(lengths), 61)
    assert read_commit(run.blobs, run.plan, 0).environment.batch == (8, 24)


def test_a_store_that_was_begun_in_stored_order_is_completed_so(job: Fields) -> None:
    """Earlier versions did not sort sequences into batches."""
    job |= {"hooks": HOOKS[:2], "segment_size": 16}
    run = actstore.plan(**job)
    request = run.plan.request.model_copy(update={"batching": None})
    actstore.extract(replace(run, plan=run.plan.model_copy(update={"request": request})))
    whole = _files(job["out"])
    assert b"batching" not in whole["_actstore/runs/0000/plan.json"]
    root = Path(job["out"])
    for name in ("manifest.json", "runs/0000/commits/00000001.json"):
        (root / "_actstore" / name).unlink()
    for shard in root.glob("*/*/c.1.*"):
        shard.unlink()
    actstore.extract(actstore.plan(**job))
    assert _files(job["out"]) == whole
    assert not actstore.verify(job["out"], deep=True).findings


def test_slots_take_their_bytes_and_no_more(job: Fields) -> None:
    plan = actstore.plan(**job | {"hooks": HOOKS[:2]}, positions="last:2").plan
    assert plan.width == plan.n_slots == 2
    layout = plan.activations(plan.request.hooks[0])
    assert layout.row_nbytes == 2 * 64 * 4
    assert layout.shape == (61, 2, 64)


def test_segments_without_a_chosen_position_are_stored(job: Fields, tmp_path: Path) -> None:
    """Only prompts of 23 tokens or more have any: most batches, and a whole segment of the two, have none."""
    long = [[7] * LENGTH, *[[5, 6]] * 80, [9] * 23]
    Path(job["tokens"]).write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in long))
    job |= {"hooks": HOOKS[:2], "segment_size": 16}
    run = actstore.plan(**job, positions="22:")
    assert "3 rows of each hook; none of 80 sequences" in str(run)
    actstore.extract(run)
    store = actstore.open(job["out"])
    assert store.counts[:].tolist() == [2, *[0] * 80, 1]
    for row, ids in ((0, long[0]), (81, long[-1])):
        kept = list(range(22, len(ids)))
        expected = alone(job, ids)[HOOKS[1]][kept]
        torch.testing.assert_close(store[HOOKS[1]][row, : len(kept)], expected, atol=2e-5, rtol=1e-4)
    assert not store[HOOKS[1]][1:81].any()
    plan = store.plan
    assert read_commit(LocalBlobs(job["out"]), plan, 2).statistics[HOOKS[1]].count == 0
    golden = read_commit(LocalBlobs(job["out"]), plan, 0).golden
    assert golden is not None
    assert golden.sequence == 0  # the only one of the segment with something to compare
    verified = actstore.verify(job["out"], deep=True)
    assert not verified.findings
    assert verified.n_rows_recomputed == 2


def test_no_position_at_all_is_an_error(job: Fields) -> None:
    with pytest.raises(TokensError, match="^positions '24:' choose no token of 61 sequences"):
        actstore.plan(**job, positions="24:")
    with pytest.raises(JobError, match="positions: should be text such as last"):
        actstore.plan(**job, positions=90)


def test_packed_text_can_have_chosen_positions_too(fields: Fields) -> None:
    actstore.extract(actstore.plan(**fields))
    whole = actstore.open(fields["out"])
    actstore.extract(actstore.plan(**fields | {"out": fields["out"] + "-some", "positions": "every:8"}))
    some = actstore.open(fields["out"] + "-some")
    for hook in whole.hooks:
        assert torch.equal(some[hook][:], whole[hook][:, ::8])


def test_behind_a_text(fields: Fields, tmp_path: Path) -> None:
    source = tmp_path / "prompts.txt"
    source.write_text("first one: a. then: the rest\nnothing here\nonce: more")
    fields |= {"tokens": str(source), "documents": "line", "packing": "document", "positions": "after: "}
    fields |= {"tokens": str(source), "positions": "after:: ", "context_length": 32}
    del fields["max_tokens"], fields["segment_size"]
    actstore.extract(actstore.plan(**fields))
    store = actstore.open(fields["out"])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fields["model"])
    assert store.positions is not None
    texts = []
    for row, count in enumerate(store.counts[:].tolist()):
        positions = store.positions[row][:count]
        texts.append(tokenizer.decode(store.tokens[row][positions]))
    assert [text.strip() for text in texts] == ["the rest", "", "more"]


@pytest.mark.parametrize("keep", [None, ["spots", "id"]], ids=str)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_positions_that_a_column_lists(
    job: Fields, tmp_path: Path, suffix: str, keep: list[str] | None
) -> None:
    spots = [
        [0, -1] if i % 3 == 0 else None if i % 3 == 1 else [len(ids) // 2] for i, ids in enumerate(prompts())
    ]
    source = tmp_path / f"listed{suffix}"
    table = pa.table({"input_ids": prompts(), "spots": spots, "id": [f"d{i}" for i in range(61)]})
    if suffix == ".parquet":
        pq.write_table(table, source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    fields = job | {"tokens": str(source), "hooks": HOOKS[:2], "positions": "column:spots", "keep": keep}
    actstore.extract(actstore.plan(**fields))
    store = actstore.open(job["out"])
    expected = [
        sorted({0, len(ids) - 1} if i % 3 == 0 else set() if i % 3 == 1 else {len(ids) // 2})
        for i, ids in enumerate(prompts())
    ]
    assert store.positions is not None
    assert store.positions[:].tolist() == [row + [-1] * (2 - len(row)) for row in expected]
    row = next(row for row, kept in enumerate(expected) if len(kept) == 2)
    values = alone(job, prompts()[row])[HOOKS[1]][expected[row]]
    torch.testing.assert_close(store[HOOKS[1]][row], values, atol=2e-5, rtol=1e-4)
    assert store.columns == tuple(keep or ())
    if keep:
        assert store.column("spots").to_pylist() == spots
    assert not actstore.verify(job["out"]).findings


def test_a_column_that_lists_no_positions(job: Fields, tmp_path: Path) -> None:
    fields = job | {"tokens": str(tmp_path / "listed.jsonl"), "positions": "column:spots"}
    for wrong in (3, "last", [1.0], [True], [None]):
        rows = [{"input_ids": [3, 4], "spots": [0]}, {"input_ids": [3, 4], "spots": wrong}]
        Path(fields["tokens"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(
            TokensError, match="^column spots has no list of positions for document 1; give whole"
        ):
            actstore.plan(**fields)
    with pytest.raises(TokensError, match=r"has no column spot; its columns are: input_ids, spots"):
        actstore.plan(**fields | {"positions": "column:spot"})
    with pytest.raises(JobError, match="^positions column:spots are for packing: document"):
        actstore.plan(**fields | {"packing": None})


def test_a_killed_run_goes_on_to_the_same_bytes(job: Fields, tmp_path: Path) -> None:
    job |= {"hooks": HOOKS[:2], "segment_size": 16, "positions": "last:2"}
    actstore.extract(actstore.plan(**job))
    whole = _files(job["out"])
    # As a kill leaves it: one segment without a record, its shards there; another with nothing; no summary.
    root = Path(job["out"])
    for name in ("manifest.json", "runs/0000/shards.parquet", "runs/0000/statistics.json"):
        (root / "_actstore" / name).unlink()
    for segment in (1, 2):
        (root / f"_actstore/runs/0000/commits/{segment:08d}.json").unlink()
    for shard in root.glob("*/*/c.2.*"):
        shard.unlink()
    actstore.extract(actstore.plan(**job))
    assert _files(job["out"]) == whole


def test_a_store_without_its_tokens_gets_the_same_positions_again(job: Fields) -> None:
    job |= {"hooks": HOOKS[:2], "positions": "sample:3", "seed": 5}
    actstore.extract(actstore.plan(**job))
    whole = _files(job["out"])
    shard = Path(job["out"], "positions/c.0.0")
    data = bytearray(shard.read_bytes())
    data[4] ^= 1
    shard.write_bytes(data)
    (finding,) = actstore.verify(job["out"]).findings
    assert (finding.key, finding.severity) == ("positions/c.0.0", "damage")
    actstore.verify(job["out"], repair=True)
    actstore.extract(actstore.plan(**job))
    assert _files(job["out"]) == whole


def _files(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def test_hooks_are_added_at_the_same_positions(job: Fields) -> None:
    job |= {"positions": "last:2"}
    actstore.extract(actstore.plan(**job | {"hooks": HOOKS[:1]}))
    run = actstore.plan(**job | {"hooks": HOOKS[:2]})
    assert (run.plan.run, run.plan.tokens_of, run.plan.n_slots) == ("0001", "0000", 2)
    actstore.extract(run)
    store = actstore.open(job["out"])
    ids = prompts()[4]
    stored = store[HOOKS[1]][4, : store.counts[4]]
    torch.testing.assert_close(stored, alone(job, ids)[HOOKS[1]][-2:], atol=2e-5, rtol=1e-4)
    with pytest.raises(
        PlanMismatchError, match=r"tokens.positions is last:2 in the store, last was asked for"
    ):
        actstore.plan(**job | {"hooks": HOOKS[:2], "positions": "last"})


def test_tokens_are_added_where_the_store_has_slots_for_them(job: Fields, tmp_path: Path) -> None:
    job |= {"hooks": HOOKS[:1], "positions": "2:6"}
    actstore.extract(actstore.plan(**job))
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"input_ids": [3, 4, 5, 6]}) + "\n")
    actstore.extract(actstore.plan(**job | {"tokens": str(more)}, append=True))
    store = actstore.open(job["out"])
    assert store.shape == (62, 4)
    assert store.positions is not None
    assert store.positions[61].tolist() == [2, 3, -1, -1]
    assert not actstore.verify(job["out"], deep=True).findings
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"input_ids": [3, 4, 5, 6, 7]}) + "\n")
    for positions in ("last", "all"):
        with pytest.raises(PlanMismatchError, match="tokens.positions is 2:6 in the store"):
            actstore.plan(**job | {"tokens": str(other), "positions": positions}, append=True)


def test_tokens_that_need_more_slots_are_refused(job: Fields, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"input_ids": [3, 4, 5, 6]}) + "\n")
    fields = job | {"hooks": HOOKS[:1], "positions": "2:6"}
    actstore.extract(actstore.plan(**fields | {"tokens": str(few)}))
    with pytest.raises(
        PlanMismatchError,
        match=r"a sequence of these tokens has 4 chosen positions, and the store has 2 slots .* another out",
    ):
        actstore.plan(**fields, append=True)
