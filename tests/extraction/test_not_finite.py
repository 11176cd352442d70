"""Values that float16 cannot hold, from a real forward: counted, reported, and left out on request."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import actstore
from actstore.cli.main import run
from actstore.errors import LoaderError
from actstore.loader.dropping.finite import NotFiniteWarning
from actstore.pairing import paired
from tests.storage.watched import READS, watched

Fields = dict[str, Any]
STREAM, PATTERN, SCORES = (
    "blocks.0.hook_resid_post",
    "blocks.1.attn.hook_pattern",
    "blocks.0.attn.hook_attn_scores",
)
FINE = "blocks.0.hook_mlp_out"
TOO_LARGE = {3: 5, 40: 0, 41: 31, 90: 2}
"""Positions by sequence at which the stream after layer 0 is too large for float16."""
N, LENGTH = 100, 32


@pytest.fixture(scope="module")
def job(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Fields:
    """65,000 of one token, and 2,000 more from every MLP: above the 65,504 that float16 holds."""
    folder = tmp_path_factory.mktemp("not_finite")
    shutil.copytree(tiny_model("gpt2"), folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.transformer.wte.weight[7, 0] = 65000.0
        model.transformer.h[0].mlp.c_proj.bias[0] = 2000.0
    model.save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(10, 300, (N, LENGTH))
    for sequence, position in TOO_LARGE.items():
        ids[sequence, position] = 7
    pq.write_table(pa.table({"input_ids": ids.tolist()}), folder / "ids.parquet")
    fields: Fields = {
        "model": str(folder / "model"),
        "tokens": str(folder / "ids.parquet"),
        "hooks": [FINE, STREAM, SCORES, PATTERN],
        "context_length": LENGTH,
        "batch_size": 8,
        "segment_size": 16,
        "dtype": "float16",
        "out": str(folder / "store"),
    }
    fields["report"] = actstore.extract(actstore.plan(**fields))
    return fields


@pytest.fixture
def fields(job: Fields, tmp_path: Path) -> Fields:
    """The same in a place of its own, done."""
    shutil.copytree(job["out"], tmp_path / "store")
    return {name: value for name, value in job.items() if name != "report"} | {"out": str(tmp_path / "store")}


def not_finite_rows(store: actstore.Store, hook: str) -> NDArray[np.bool_]:
    """[N, L] by NumPy, from all stored values."""
    values = store[hook].numpy().astype(np.float32)
    is_wrong: NDArray[np.bool_] = (~np.isfinite(values)).reshape(N, LENGTH, -1)
    return np.asarray(is_wrong.any(-1))


def counts_in(report: actstore.Report) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {name: (one.n_tokens, one.first_sequences) for name, one in report.not_finite.items()}


def test_report_says_how_many_and_where(job: Fields) -> None:
    store = actstore.open(job["out"])
    rows = not_finite_rows(store, STREAM)
    assert {n: int(np.flatnonzero(rows[n])[0]) for n in np.flatnonzero(rows.any(1))} == TOO_LARGE
    assert rows.sum() == 4
    patterns = not_finite_rows(store, PATTERN)
    assert patterns.sum() > 4  # all positions that see one
    assert not_finite_rows(store, SCORES).sum() > 0  # they mask with -Inf, which is no fault
    assert not not_finite_rows(store, FINE).any()
    expected = {STREAM: (4, (3, 40, 41, 90)), PATTERN: (int(patterns.sum()), (3, 40, 41, 90))}
    assert counts_in(job["report"]) == expected
    assert f"NaN or infinity  {STREAM}: 4 tokens, first in sequences 3, 40, 41, 90" in str(job["report"])
    assert job["report"].to_dict()["not_finite"][STREAM] == {
        "n_tokens": 4,
        "first_sequences": (3, 40, 41, 90),
    }
    assert {name: store.stats(name).n_not_finite for name in (STREAM, FINE)} == {STREAM: 4, FINE: 0}
    assert store.stats(STREAM).mean_norm == pytest.approx(
        np.linalg.norm(store[STREAM].numpy().astype(np.float64)[~rows], axis=-1).mean()
    )


def test_report_of_what_earlier_runs_computed(fields: Fields, capsys: pytest.CaptureFixture[str]) -> None:
    planned = actstore.plan(**fields)
    calls = watched(planned.blobs)
    assert counts_in(actstore.extract(replace(planned, blobs=calls))) == {STREAM: (4, (3,))}
    records = [key for key in calls.of(READS) if "/commits/" in key]
    assert len(records) == len(set(records))  # to say where; that all are there, a listing shows
    commits = Path(fields["out"], "_actstore/runs/0000/commits")
    Path(fields["out"], "_actstore/manifest.json").unlink()
    (commits / "00000002.json").unlink()
    report = actstore.extract(actstore.plan(**fields))
    patterns = not_finite_rows(actstore.open(fields["out"]), PATTERN)[32:48].sum()
    assert counts_in(report) == {STREAM: (4, (40, 41)), PATTERN: (patterns, (40, 41))}
    options = [f"--{name.replace('_', '-')}" for name in fields]
    values = [",".join(value) if isinstance(value, list) else str(value) for value in fields.values()]
    given = [text for both in zip(options, values, strict=True) for text in both]
    assert run(["extract", *given, "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["not_finite"][STREAM]["n_tokens"] == 4


def test_statistics_say_where(job: Fields, capsys: pytest.CaptureFixture[str]) -> None:
    store = actstore.open(job["out"])
    assert store.not_finite(STREAM) == [(range(16), 1), (range(32, 48), 2), (range(80, 96), 1)]
    assert store.not_finite(STREAM, most_segments=1) == [(range(16), 1)]
    assert store.not_finite(STREAM, most_records=3) == [
        (range(16), 1), (range(32, 48), 2), (range(48, 100), 1)
    ]  # fmt: skip
    assert store.not_finite(FINE) == []
    assert run(["stats", job["out"], STREAM]) == 0
    assert "tokens 1 of sequences 0:16, 2 of sequences 32:48, 1 of sequences 80:96" in capsys.readouterr().out
    assert run(["stats", job["out"], STREAM, FINE, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document[STREAM]["not_finite_in"] == [[0, 16, 1], [32, 48, 2], [80, 96, 1]]
    assert document[FINE]["not_finite_in"] == []


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_loader_says_so_once(fields: Fields, is_finished: bool) -> None:
    if not is_finished:
        Path(fields["out"], "_actstore/manifest.json").unlink()
    store = actstore.open(fields["out"])
    where = "1 row of sequences 0:16, 2 rows of sequences 32:48, 1 row of sequences 80:96; give drop"
    with pytest.warns(NotFiniteWarning, match=f"{STREAM} in {where}") as caught:
        store.loader([STREAM, FINE], batch_size=64)
    assert len(caught) == 1
    assert FINE not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.loader(FINE, batch_size=64).n_rows == N * LENGTH
        assert store.loader(FINE, batch_size=64, drop="nonfinite").n_rows == N * LENGTH
        assert store.loader(STREAM, batch_size=64, max_norm=1e6).n_rows == N * LENGTH - 4


@pytest.mark.parametrize(
    "hooks", [[STREAM], [FINE, STREAM], [SCORES], [PATTERN]], ids=lambda hooks: hooks[-1]
)
def test_rows_that_are_not_finite_can_be_dropped(job: Fields, hooks: list[str]) -> None:
    store = actstore.open(job["out"])
    wrong = np.zeros((N, LENGTH), bool) if hooks == [SCORES] else not_finite_rows(store, hooks[-1])
    with store.loader(
        hooks, batch_size=64, shuffle=None, drop=["nonfinite"], seqpos=slice(1, None), provenance=True
    ) as loader:
        batches = list(loader)
    kept = np.zeros((N, LENGTH), bool)
    for batch in batches:
        kept[batch.sequences, batch.positions] = True
    wrong[:, 0] = True
    assert np.array_equal(kept, ~wrong)


def test_only_segments_that_have_some_are_read(fields: Fields) -> None:
    """The other tokens are left out, without an error."""
    for segment in (1, 3, 4, 6):
        Path(fields["out"], f"acts/{STREAM}/c.{segment}.0.0").unlink()
    store = actstore.open(fields["out"])
    assert store.loader(STREAM, batch_size=64, drop=["nonfinite"]).n_rows == N * LENGTH - 4


def test_pairs_cannot_drop_by_value(job: Fields) -> None:
    for drop in ("nonfinite", ["bos", "nonfinite"]):
        with pytest.raises(LoaderError, match="would drop other rows in each store"):
            paired([(job["out"], STREAM), (job["out"], FINE)], batch_size=64, drop=drop)
