"""``actstore probe``: a table, JSON, files; labels of columns and files; jobs; wrong usage."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from actstore import analysis
from actstore.analysis import Probe
from actstore.cli.main import cli
from actstore.facade import Store
from tests.analysis.probes.stores import chances, store_of_rows, values_of
from tests.analysis.stores import HOOK
from tests.commands import command_here
from tests.query.running import running

GLOB = "blocks.*.hook_resid_post"


@pytest.fixture(scope="module")
def labels() -> NDArray[np.int64]:
    return (chances(values_of()) > 0.5).astype(np.int64)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, labels: NDArray[np.int64]) -> Store:
    """With the labels beside it, as files of each kind."""
    folder = tmp_path_factory.mktemp("probe")
    store = store_of_rows(folder / "store", values_of())
    np.save(folder / "labels.npy", labels)
    sequence, position = np.indices(labels.shape).reshape(2, -1)
    table = pd.DataFrame({"sequence": sequence, "position": position, "label": labels.reshape(-1)})
    table.sample(frac=1, random_state=0).to_csv(folder / "labels.csv", index=False)
    table.to_parquet(folder / "labels.parquet")
    return store


def file(store: Store, name: str) -> str:
    return str(Path(store.url).parent / name)


def run(*args: str) -> Result:
    done = CliRunner().invoke(cli, ["probe", *args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def without_time(printed: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(printed)
    del document["seconds"]
    return document


@pytest.mark.parametrize("name", ["labels.npy", "labels.csv", "labels.parquet"])
def test_probes_are_those_of_the_library(store: Store, labels: NDArray[np.int64], name: str) -> None:
    probes = analysis.fit_probe(store, GLOB, labels, l2=(0.1, 1), seed=3, n_bootstrap=20, curve=(0.5,))
    done = run(
        *(store.url, "--hook", GLOB, "--labels", file(store, name), "--l2", "0.1,1", "--seed", "3"),
        *("--n-bootstrap", "20", "--curve", "0.5", "--json"),
    )
    expected = probes.to_dict()
    del expected["seconds"]
    assert without_time(done.stdout) == json.loads(json.dumps(expected))


def test_files_and_progress(store: Store, tmp_path: Path) -> None:
    out, plot, save = (str(tmp_path / name) for name in ("probes.parquet", "probes.png", "probes"))
    done = run(
        *(store.url, "--hook", HOOK, "--hook", "blocks.1.attn.hook_z", "--labels", file(store, "labels.npy")),
        *("--l2", "0.1", "--out", out, "--plot", plot, "--save", save),
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("logistic, 2 hooks: trained on 576 rows of 72 documents")
    assert [line.split()[0] for line in lines[-2:]] == [HOOK, "blocks.1.attn.hook_z"]
    assert pd.read_parquet(out).hook.to_list() == [HOOK, "blocks.1.attn.hook_z"]
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    assert Probe.load(f"{save}/{HOOK}.safetensors").hook == HOOK
    assert "scanned 100%: 90 of 90 sequences" in done.stderr
    assert re.search(r"fitted 100%: 2 of 2 hooks, [\d,.]+ hooks/s, 0:00 left", done.stderr)


def test_job_file(store: Store, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    labels = file(store, "labels.npy")
    job.write_text(
        f"store: {store.url}\nhook: ['{GLOB}']\nlabels: {labels}\nl2: [0.1]\nkind: mean_difference\nseed: 5\n"
    )
    by_job = run("--job", str(job), "--json", "--quiet")
    assert not by_job.stderr
    by_options = run(
        *(store.url, "--hook", GLOB, "--labels", labels, "--kind", "mean_difference", "--seed", "5", "--json")
    )
    assert without_time(by_job.stdout) == without_time(by_options.stdout)
    other = json.loads(run("--job", str(job), "--seed", "6", "--json").stdout)
    assert other["probes"] != json.loads(by_job.stdout)["probes"]


def test_served_store(store: Store) -> None:
    """The same over HTTP."""
    folder = Path(store.url).parent
    options = ("--hook", GLOB, "--labels", file(store, "labels.npy"), "--l2", "0.1", "--json")
    with running(folder, "--root", str(folder)) as server:
        served = without_time(run(f"{server.url}/v1/stores/store", *options).stdout)
    assert served == without_time(run(store.url, *options).stdout)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--hook": None}, "Missing option '--hook'"),
        ({"--labels": None}, "Missing option '--labels'"),
        ({"--labels": "label"}, "keeps no column label; its columns are: none"),
        ({"--labels": "absent.csv"}, "there is no file absent.csv"),
        ({"--hook": "blocks.7.hook_resid_post"}, "does not hold 'blocks.7.hook_resid_post'"),
        ({"--l2": "much"}, "'much' is not numbers"),
        ({"--l2": "-1"}, "give numbers above 0"),
        ({"--held-out": "2"}, "held_out is 2; give a share"),
        ({"--out": "probes.csv"}, "probes.csv must end with .parquet"),
        ({"--plot": "probes.jpg"}, "probes.jpg must end with .png"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, dict) else "",
)
def test_wrong_usage(store: Store, changes: dict[str, str | None], says: str) -> None:
    options: dict[str, str | None] = {"--hook": HOOK, "--labels": file(store, "labels.npy")}
    options |= changes
    args = [part for name, value in options.items() if value is not None for part in (name, value)]
    done = command_here("probe", store.url, *args)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("label\n1\n", "labels have the shape [1]"),
        ("class\n1\n", "has the columns class; name the one with the labels label"),
        ("label,sequence,speaker\n1,0,a\n", "has a column speaker"),
        ("label,position\n1,0\n", "has positions and no sequences"),
        ("label,sequence\n1,90\n", "has a sequence that the store does not have; they are 0 to 89"),
        ("label,sequence,position\n1,0,8\n", "has a position that the store does not have; they are 0 to 7"),
        ("label,sequence\n1,0\n0,0\n", "has two labels for one place"),
    ],
    ids=["too few", "no label", "other column", "no sequence", "beyond", "beyond position", "twice"],
)
def test_files_that_are_refused(store: Store, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    done = command_here("probe", store.url, "--hook", HOOK, "--labels", str(path))
    assert done.returncode == 1
    assert says in done.stderr


def test_job_that_is_not_valid(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("store: here\nhook: x\nlabels: y\nkind: svm\n")
    done = command_here("probe", "--job", str(job))
    assert done.returncode == 2
    assert "'svm' is not one of" in done.stderr
