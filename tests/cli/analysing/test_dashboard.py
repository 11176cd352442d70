"""``actstore dashboard`` as users meet it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

import actstore
from actstore.cli.main import cli
from actstore.errors import ActstoreError

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def store(tiny_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dashboard") / "store"
    actstore.extract(
        model=str(tiny_model("gpt2")),
        tokens=str(text_file),
        hooks=[HOOK],
        context_length=16,
        max_tokens=320,
        dtype="float32",
        out=str(out),
    )
    return out


def run(*args: str) -> Result:
    done = CliRunner().invoke(cli, ["dashboard", *args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def rows(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = pq.read_table(folder / "features.parquet").to_pydict()
    return table


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_directions_of_a_file(
    store: Path, tmp_path: Path, tiny_model: Callable[..., Path], suffix: str
) -> None:
    directions = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    path = tmp_path / f"directions{suffix}"
    if suffix == ".npy":
        np.save(path, directions)
    else:
        save_file({"directions": directions}, path)
    out = tmp_path / "out"
    options = ["--hook", HOOK, "--of", str(path), "--out", str(out), "--features", "1:4", "--drop", "7,bos"]
    done = run(str(store), *options, "--model", str(tiny_model("gpt2")))
    assert "3 features over" in done.stdout
    assert "scanned 100%" in done.stderr
    assert "rows/s, 0:00 left" in done.stderr
    assert re.search(r"wrote 100%: 3 of 3 pages, [\d,.]+ pages/s, 0:00 left", done.stderr)
    opened = actstore.open(str(store))
    tokens = opened.tokens[:]
    kept = (tokens != 7) & (tokens != opened.tokenizer.bos_token_id)
    values = (opened[HOOK][:].numpy() @ directions[1:4].T)[kept]
    table = rows(out)
    assert table["feature_index"] == [1, 2, 3]
    np.testing.assert_allclose(table["max_activation"], values.max(0), rtol=1e-4)
    np.testing.assert_allclose(table["frac_nonzero"], (values > 0).mean(0))
    assert len(table["pos_str"][0]) == 10
    again = run(str(store), *options, "--model", str(tiny_model("gpt2")), "--json", "--quiet")
    assert json.loads(again.stdout)["index"] == f"{out}/index.html"
    assert again.stderr == ""


def test_job_file_and_options_over_it(store: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"store: {store}\nhook: {HOOK}\nneurons: [3, 9, 3]\nk: 2\nsamples: 0\nout: nowhere\n")
    done = run("--job", str(job), "--out", str(tmp_path / "out"), "--json", "--quiet")
    printed = json.loads(done.stdout)
    assert (printed["n_features"], printed["n_pages_before"], printed["n_rows"]) == (2, 0, 320)
    assert rows(tmp_path / "out")["feature_index"] == [3, 9]
    examples = pq.read_table(tmp_path / "out/activations.parquet").to_pydict()
    assert examples["feature_index"] == [3, 3, 9, 9]


def test_sae_of_saelens(store: Path, tmp_path: Path) -> None:
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from SAELens itself
        from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=64, d_sae=24, k=4))
    sae.save_model(str(tmp_path / "sae"))
    run(str(store), "--hook", HOOK, "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "out"), "--quiet")
    with torch.no_grad():
        latents = sae.encode(actstore.open(str(store))[HOOK][:]).flatten(0, 1).numpy()
    np.testing.assert_allclose(rows(tmp_path / "out")["frac_nonzero"], (latents > 0).mean(0))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give one of them"),
        (["--neurons", "5:2"], "there are neurons 0 to 63"),
        (["--neurons", "64"], "there are neurons 0 to 63"),
        (["--features", "3"], "give one of them"),
        (["--sae", "nowhere"], "nowhere holds no cfg.json of an SAE"),
        (["--of", "nowhere.npy"], r"nowhere.npy cannot be read"),
        (["--sae", "a", "--of", "b"], "give one of them"),
        (["--neurons", "1", "--intervals", "63"], "intervals"),
        (["--job", "nowhere.yaml"], "job file cannot be read"),
    ],
    ids=["none", "backwards", "beyond", "of what", "no sae", "no file", "both", "intervals", "no job"],
)
def test_what_is_wrong_is_said(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ActstoreError, match=says):
        CliRunner().invoke(
            cli, ["dashboard", str(store), "--hook", HOOK, *options, "--quiet"], catch_exceptions=False
        )
    assert not (tmp_path / "dashboard").exists()
