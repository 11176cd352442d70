"""``actstore top`` against a stable sort of all values, and its text against that of the store."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from safetensors.numpy import save_file

import actstore
from actstore.analysis import top_activations
from actstore.cli.main import cli
from actstore.errors import HookError, JobError, StorageError
from tests.analysis.stores import SHAKESPEARE_HOOK as HOOK
from tests.analysis.stores import saved_sae, shakespeare


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    return shakespeare(tmp_path_factory.mktemp("top"))


def run(store: actstore.Store, *args: Any) -> Result:
    return CliRunner().invoke(cli, ["top", store.url, "--hook", HOOK, *map(str, args)])


def printed(store: actstore.Store, *args: Any) -> Any:
    done = run(store, *args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def best(
    features: NDArray[np.float32], store: actstore.Store, k: int, floor: float = -np.inf
) -> list[tuple[int, ...]]:
    """(feature, sequence, position) of the k largest of [n_sequences, width, n_features], the first of equals first."""
    real = np.arange(features.shape[1]) < store.lengths[:][:, None]
    flat = np.where(real[..., None], features, -np.inf).reshape(-1, features.shape[-1])
    order = np.argsort(-flat, axis=0, kind="stable")[:k].T
    return [
        (feature, *map(int, divmod(int(row), features.shape[1])))
        for feature, rows in enumerate(order)
        for row in rows
        if flat[row, feature] > floor
    ]


def places(document: Any) -> list[tuple[int, ...]]:
    return [(row["feature"], row["sequence"], row["position"]) for row in document["rows"]]


def test_directions_of_files(store: actstore.Store, tmp_path: Path) -> None:
    values = store[HOOK][:].float().numpy()
    directions = np.random.default_rng(0).standard_normal((3, values.shape[-1])).astype(np.float32)
    np.save(tmp_path / "directions.npy", directions)
    save_file({"directions": directions}, tmp_path / "directions.safetensors")
    expected = best((torch.from_numpy(values) @ torch.from_numpy(directions).T).numpy(), store, 4)
    for name in ("directions.npy", "directions.safetensors"):
        assert places(printed(store, "--of", tmp_path / name, "-k", 4)) == expected
    only = printed(store, "--of", tmp_path / "directions.npy", "-k", 4, "--features", "2")
    assert places(only) == [one for one in expected if one[0] == 2]


def test_latents_of_an_sae(store: actstore.Store, tmp_path: Path) -> None:
    values = store[HOOK][:].float()
    sae = saved_sae(tmp_path / "sae", values.shape[-1])
    with torch.no_grad():
        latents = sae.encode(values.flatten(0, 1)).view(*values.shape[:2], -1).numpy()
    document = printed(store, "--sae", tmp_path / "sae", "-k", 3)
    assert places(document) == best(latents, store, 3, 0.0)
    assert document["n_rows"] == store.n_tokens


def test_text_shows_the_row_in_its_context(store: actstore.Store) -> None:
    (sequence, position), (other, _) = [
        one[1:] for one in best(store[HOOK][:].float().numpy()[..., 5:6], store, 2)
    ]
    tokens = store.str_tokens(sequence)
    done = run(store, "--neurons", 5, "-k", 2, "--window", 3)
    shown = "".join(
        f"[[{token}]]" if at == position else token
        for at, token in enumerate(tokens)
        if abs(at - position) <= 3
    ).replace("\n", "↵")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{HOOK}: 1 features of {store.n_tokens:,} rows"
    assert lines[2] == "feature 5"
    assert lines[3].endswith(shown)
    assert f"{sequence}:{position}" in lines[3]
    assert f" {other}:" in lines[4]
    assert "scanned 100%" in done.stderr
    assert "left" in done.stderr
    assert "\x1b" not in done.stdout


def test_parquet_has_all_rows_with_their_text(store: actstore.Store, tmp_path: Path) -> None:
    done = run(
        store, "--neurons", "7,1", "-k", 5, "--per", "sequence", "--out", tmp_path / "top.parquet", "--quiet"
    )
    assert done.exit_code == 0, done.output
    assert not done.stderr
    assert done.stdout.splitlines()[-1] == f"10 rows of 2 features are in {tmp_path / 'top.parquet'}"
    table = pq.read_table(tmp_path / "top.parquet")
    assert table.schema.metadata[b"actstore.hook"].decode() == HOOK
    rows = table.to_pylist()
    assert [(row["feature"], row["rank"]) for row in rows] == [(f, i) for f in (7, 1) for i in range(5)]
    values = store[HOOK].at([row["sequence"] for row in rows], [row["position"] for row in rows]).float()
    documents = store.documents[:]
    for row, value in zip(rows, values.tolist(), strict=True):
        tokens = store.str_tokens(row["sequence"])
        assert row["value"] == value[row["feature"]]
        assert row["token"] == tokens[row["position"]] == row["context"][row["at"]]
        assert row["context"] == tokens[max(0, row["position"] - 10) : row["position"] + 11]
        assert (
            row["token_id"] == row["context_ids"][row["at"]] == store.tokens[row["sequence"], row["position"]]
        )
        assert len(row["context_ids"]) == len(row["context"])
        document = documents[row["sequence"], row["position"]]
        assert row["document"] == (None if document < 0 else document)
    assert len({(row["feature"], row["sequence"]) for row in rows}) == 10


def test_job_file_and_the_command_line(store: actstore.Store, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"url: {store.url}\nhook: {HOOK}\nneurons: [3, 4]\nk: 6\nseqpos: '1:'\nsequences: [0, 2, 5]\ndrop: [eos, 13]\n"
        "json: true\nquiet: true\n"
    )
    done = CliRunner().invoke(cli, ["top", "--job", str(job), "-k", "2"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    args = [
        "--neurons",
        "3,4",
        "-k",
        2,
        "--seqpos",
        "1:",
        "--sequences",
        "0,2,5",
        "--drop",
        "eos,13",
        "--quiet",
    ]
    assert json.loads(done.stdout) == printed(store, *args)
    job.write_text("url: x\nneuron: 3\n")
    error = CliRunner().invoke(cli, ["top", "--job", str(job)]).exception
    assert str(error) == f"{job}: neuron is not a field of a job of top (the nearest is neurons)"


def test_resumed_scan_is_the_same(store: actstore.Store, tmp_path: Path) -> None:
    args = ["--neurons", 2, "-k", 3, "--resume", tmp_path / "kept"]
    first = printed(store, *args)
    assert list((tmp_path / "kept").rglob("*.safetensors"))
    assert printed(store, *args) == first == printed(store, *args[:4])


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ([], JobError, "give one of them"),
        (["--neurons", "1", "--sae", "x"], JobError, "give one of them"),
        (["--neurons", "99999"], JobError, "there are neurons 0 to"),
        (["--neurons", "1", "--features", "0"], JobError, "name the neurons themselves"),
        (["--of", "x.txt"], JobError, "neither .npy nor .safetensors"),
        (["--of", "gone.npy"], StorageError, "gone.npy cannot be read"),
        (["--sae", "."], JobError, "no cfg.json of an SAE"),
        (["--neurons", "1", "--executor", "rocket"], JobError, "rocket"),
        (["--neurons", "1", "--hook", "blocks.9.mlp"], HookError, "does not hold"),
    ],
    ids=["nothing", "two", "neuron", "features", "suffix", "gone", "no sae", "executor", "hook"],
)
def test_wrong_arguments(
    store: actstore.Store,
    args: list[str],
    error: type[Exception],
    says: str,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(store, *args)
    assert isinstance(done.exception, error), done.output
    assert says in str(done.exception)


def test_files_that_hold_no_directions(store: actstore.Store, tmp_path: Path) -> None:
    np.save(tmp_path / "deep.npy", np.zeros((2, 3, 4)))
    save_file({"a": np.zeros(2), "b": np.zeros(2)}, tmp_path / "two.safetensors")
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name, says in (
        ("deep.npy", "of shape (2, 3, 4)"),
        ("two.safetensors", "holds 2 tensors (a, b)"),
        ("broken.npy", "is no .npy"),
        ("broken.safetensors", "is no .safetensors"),
    ):
        done = run(store, "--of", tmp_path / name)
        assert isinstance(done.exception, JobError)
        assert says in str(done.exception)


def test_rows_of_each_quantile(store: actstore.Store) -> None:
    document = printed(store, "--neurons", 4, "-k", 2, "--above", 0, "--by-quantile", 3)
    assert [row["quantile"] for row in document["rows"]] == [0, 0, 1, 1, 2, 2]
    top = top_activations(store, HOOK, [4], 2, above=0, by_quantile=3)
    assert [row["value"] for row in document["rows"]] == top.values[0].tolist()
