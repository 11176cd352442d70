"""``actstore evaluate-sae`` prints what `evaluate_sae` gives."""

import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import actstore
from actstore import analysis
from actstore.cli.main import cli, run
from actstore.demo import MODEL_PATH
from actstore.facade import Store

with warnings.catch_warnings():
    # Warnings of SAELens while it is imported are not under test.
    warnings.simplefilter("ignore")
    from tests.analysis.sae_evaluation.saes import sae_of

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Store:
    out = tmp_path_factory.mktemp("store") / "store"
    job = actstore.plan(
        model=str(MODEL_PATH),
        tokens=str(text_file),
        documents="paragraph",
        hooks=[HOOK],
        context_length=32,
        max_tokens=64 * 32,
        dtype="float32",
        out=str(out),
    )
    actstore.extract(job)
    return actstore.open(str(out))


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Path:
    """Folders of SAEs, named as SAELens names checkpoints."""
    folder = tmp_path_factory.mktemp("saes")
    for name, kind in (("64", "standard"), ("128", "topk")):
        sae_of(kind, store[HOOK].shape[-1], 96).save_model(folder / name)
    return folder


def evaluate(*args: object) -> Result:
    done = CliRunner().invoke(cli, ["evaluate-sae", *map(str, args)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_figures_of_all_in_a_folder(store: Store, saes: Path, tmp_path: Path) -> None:
    files = ["--out", tmp_path / "saes.parquet", "--plot", tmp_path / "saes.png"]
    chosen = ["--held-out", "0.5", "--seed", "3", "--seqpos", "1:", "--drop", "bos"]
    done = evaluate(store.url, "--hook", HOOK, "--sae", saes, *chosen, *files)
    expected = analysis.evaluate_sae(
        store, HOOK, saes, held_out=0.5, seed=3, seqpos=slice(1, None), drop=["bos"]
    )
    assert done.stdout.strip() == repr(expected)
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["SAE", "64", "128"]
    assert "scanned 100%: 64 of 64 sequences" in done.stderr
    table = pq.read_table(tmp_path / "saes.parquet")
    assert table["explained_variance"].to_pylist() == [one.explained_variance for one in expected]
    assert (tmp_path / "saes.png").read_bytes().startswith(b"\x89PNG")


def test_json_with_losses(store: Store, saes: Path) -> None:
    several = ["--sae", saes / "64", "--sae", saes / "128"]
    model = ["--model", MODEL_PATH, "--n-sequences", "4", "--sequences", "8:40"]
    done = evaluate(store.url, "--hook", HOOK, *several, *model, "--json")
    found = json.loads(done.stdout)
    expected = analysis.evaluate_sae(
        store,
        HOOK,
        {str(saes / name): saes / name for name in ("64", "128")},
        model=str(MODEL_PATH),
        n_sequences=4,
        sequences=slice(8, 40),
    )
    assert [one["name"] for one in found["saes"]] == [str(saes / "64"), str(saes / "128")]
    for one, figures in zip(found["saes"], expected, strict=True):
        assert one == figures.to_dict() | {"dead_features": figures.dead_features.tolist()}
        assert one["n_tokens"] == 4 * 31
    of_model, of_scan = done.stderr.splitlines()
    assert of_model.startswith("computed 100%: 128 of 128 tokens, ")
    assert of_scan.startswith("scanned 100%: 64 of 64 sequences, ")


def test_figures_that_are_no_numbers_are_null(store: Store, saes: Path) -> None:
    """All rows of the first position are those of BOS, without variance."""
    rows = store[HOOK][:, 0].float().numpy()
    assert np.ptp(rows, 0).max() < 1e-4
    one = ["--seqpos", "0", "--sequences", "0:1", "--json", "--quiet"]
    done = evaluate(store.url, "--hook", HOOK, "--sae", saes / "64", *one)
    assert json.loads(done.stdout)["saes"][0]["explained_variance"] is None
    assert not done.stderr


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--out", "saes.txt"], 2, "must end with .parquet"),
        (["--plot", "nowhere/saes.png"], 2, "there is no folder"),
        (["--held-out", "0"], 2, "held-out"),
        (["--sae", "."], 1, "holds no SAE"),
        (["--model", "nowhere"], 1, "nowhere"),
    ],
    ids=["table", "picture", "fraction", "folder", "model"],
)
def test_what_cannot_be_is_said_in_a_sentence(
    options: list[str],
    code: int,
    says: str,
    store: Store,
    saes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate-sae", store.url, "--hook", HOOK, "--sae", str(saes / "64"), *options]) == code
    printed = capfd.readouterr()
    assert says in printed.err
    assert not printed.out
