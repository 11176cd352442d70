"""``actstore pca`` as users meet it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import actstore
from actstore import analysis
from actstore.cli.main import cli
from tests.analysis.stores import HOOK, D, store_of
from tests.commands import command_here
from tests.store.example import HOOKS


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store whose rows differ most along element 3."""
    values = np.random.default_rng(0).standard_normal((100, 8, D)).astype(np.float32)
    values[..., 3] *= 10
    return store_of(tmp_path_factory.mktemp("pca"), values).url


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args), catch_exceptions=False)


def test_table_progress_and_files(url: str, tmp_path: Path) -> None:
    out, plot = tmp_path / "pca.safetensors", tmp_path / "pca.png"
    done = command_here(
        "pca",
        url,
        "--hook",
        HOOK,
        "--components",
        "3",
        "--seqpos",
        "1:",
        "--out",
        str(out),
        "--plot",
        str(plot),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"scanned 100%: 100 of 100 sequences, [\d,]+ rows/s, 0:00 left", done.stderr)
    head, line = done.stdout.splitlines()
    assert head.split()[:4] == ["hook", "rows", "size", "variance"]
    assert line.split()[:3] == [HOOK, "700", "16"]
    saved = analysis.PCA.load(out)
    expected = analysis.pca(actstore.open(url), HOOK, 3, seqpos=slice(1, None))
    np.testing.assert_array_equal(saved.components, expected.components)
    assert saved.components[0].argmax() == 3
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_json_of_several_hooks(url: str) -> None:
    done = run("pca", url, "--hook", ",".join(HOOKS[:2]), "--components", "2", "--json")
    document = json.loads(done.stdout)
    assert list(document) == list(HOOKS[:2])
    assert document[HOOK]["rows"] == 800
    expected = analysis.pca(actstore.open(url), HOOK, 2)
    assert document[HOOK]["explained_variance"] == expected.explained_variance.tolist()
    assert document[HOOKS[1]]["explained_variance_ratio"] == [None, None], "its rows are all 0"


def test_job_file_and_options_that_take_precedence(url: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"hook: {HOOK}\ncomponents: 2\ndrop: ['9', '10']\n")
    done = json.loads(run("pca", url, "--job", str(job), "--components", "4", "--json").stdout)
    assert done[HOOK]["rows"] == 798
    assert len(done[HOOK]["explained_variance"]) == 4


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "Missing option '--hook'"),
        (("--hook", "blocks.7.mlp"), "does not hold"),
        (("--hook", HOOK, "--components", "17"), "it can be 1 to 16"),
        (("--hook", HOOK, "--out", "pca.npz"), "must end with .safetensors or .parquet"),
        (("--hook", HOOK, "--plot", "pca.jpg"), "must end with .png"),
        (("--hook", HOOK, "--drop", "nothing"), "drop names 'nothing'"),
        (("--hook", HOOK, "--seqpos", "a:b"), "is not a range"),
        (("--hook", HOOK, "--plot", "pca.png", "--color", "label"), "keeps no column"),
    ],
    ids=["hook", "absent", "components", "out", "plot", "drop", "seqpos", "color"],
)
def test_what_cannot_be(
    url: str, args: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command_here("pca", url, *args)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert not list(tmp_path.iterdir())
