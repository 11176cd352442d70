"""``actstore stats`` and ``actstore info`` over stores of several runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import actstore
from actstore.cli.main import cli
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import commit_key
from actstore.store.records.seal import seal, unseal
from tests.commands import command, command_here
from tests.store.example import HOOKS, LENGTH, N, example_plan, write_store
from tests.store.runs import MLP_OUT, hooks_run, tokens_run, write_run
from tests.store.verifying.test_verify import make_store, numbers

RESID_0 = HOOKS[0]


def run(*args: str) -> str:
    done = CliRunner().invoke(cli, list(args), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def store(tmp_path: Path) -> LocalBlobs:
    blobs = LocalBlobs(tmp_path / "store")
    make_store(blobs)
    return blobs


def test_table_of_all_hooks(store: LocalBlobs) -> None:
    lines = run("stats", store.url).splitlines()
    assert lines[0].split()[:2] == ["hook", "tokens"]
    assert [line.split()[0] for line in lines[1:]] == list(actstore.open(store.url).hooks)
    assert len({len(line) for line in lines}) == 1
    norms = np.linalg.norm(numbers(example_plan())[RESID_0].astype(float), axis=-1)
    cells = next(line for line in lines if line.startswith(RESID_0)).split()
    assert cells[1] == str(N * LENGTH)
    assert float(cells[2]) == pytest.approx(norms.mean(), rel=1e-3)
    assert float(cells[3]) == pytest.approx(np.sqrt((norms**2).mean()), rel=1e-3)
    assert float(cells[4]) == pytest.approx(np.quantile(norms, 0.5), rel=0.02)
    assert float(cells[6]) == pytest.approx(norms.max(), rel=1e-3)
    assert cells[8] == "0"


def test_one_hook_under_another_name(store: LocalBlobs) -> None:
    lines = run("stats", store.url, "blocks.1.hook_resid_pre").splitlines()
    assert [line.split()[0] for line in lines] == ["hook", RESID_0]


def test_json(store: LocalBlobs) -> None:
    (printed,) = json.loads(run("stats", store.url, RESID_0, "--json")).values()
    values = numbers(example_plan())[RESID_0].astype(float)
    assert printed["count"] == N * LENGTH
    np.testing.assert_allclose(printed["mean"], values.mean((0, 1)), rtol=1e-9)
    assert list(printed["norm_quantiles"]) == ["0.01", "0.1", "0.5", "0.9", "0.99"]


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    blobs, plan = LocalBlobs(tmp_path / "store"), example_plan()
    values = {name: np.full_like(array, np.nan) for name, array in numbers(plan).items()}
    write_store(blobs, plan, values, (0, 1, 2))
    seal(blobs)
    line = run("stats", blobs.url, RESID_0).splitlines()[1].split()
    assert line[1:] == ["0", *["nan"] * 6, str(N * LENGTH)]
    printed = json.loads(run("stats", blobs.url, RESID_0, "--json"))[RESID_0]
    assert (printed["mean"], printed["mean_norm"], printed["n_not_finite"]) == (None, None, N * LENGTH)


def test_hook_that_is_not_stored(store: LocalBlobs) -> None:
    done = command_here("stats", store.url, "blocks.1.hook_mlp_out")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {store.url} does not hold 'blocks.1.hook_mlp_out'; it holds ")


def test_nothing_committed_yet(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    make_store(blobs, segments=(), sealed=False)
    done = command("stats", blobs.url)
    assert done.returncode == 1
    assert "is committed in" in done.stderr


def test_hooks_of_which_nothing_is_committed_yet_are_left_out(store: LocalBlobs) -> None:
    unseal(store)
    write_run(store, hooks_run("0001", MLP_OUT), ())
    lines = run("stats", store.url).splitlines()
    assert [line.split()[0] for line in lines[1:]] == sorted(
        HOOKS, key=(*HOOKS[:1], HOOKS[2], HOOKS[1]).index
    )


def test_info_of_several_runs(store: LocalBlobs) -> None:
    unseal(store)
    write_run(store, hooks_run("0001", MLP_OUT))
    write_run(store, tokens_run("0002"), (0, 2))
    text = run("info", store.url)
    assert "(not complete: 8 of 9 segments)" in text
    assert f"{2 * N * LENGTH:,} in {2 * N:,} sequences of {LENGTH}" in text
    for line in (
        "0000: 3 hooks of text.txt, 3 of 3 segments",
        f"0001: {MLP_OUT} over the tokens of run 0000, 3 of 3 segments",
        "0002: 3 hooks of text.txt, 2 of 3 segments",
    ):
        assert line in text
    printed = json.loads(run("info", store.url, "--json"))
    assert [run_fields["run"] for run_fields in printed["runs"]] == ["0000", "0001", "0002"]
    assert [run_fields["finished"] for run_fields in printed["runs"]] == [True, False, False]
    assert (printed["complete"], printed["n_sequences"], printed["n_sequences_committed"]) == (
        False,
        2 * N,
        N,
    )


@pytest.mark.parametrize(("of_first", "of_second"), [((0, 1, 2), (0, 2)), ((0, 2), (1, 2)), ((), (0, 1, 2))])
def test_committed_sequences_are_those_of_all_runs(
    tmp_path: Path, of_first: tuple[int, ...], of_second: tuple[int, ...]
) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    make_store(blobs, segments=of_first, sealed=False)
    # The segments of the second run have other boundaries.
    write_run(blobs, hooks_run("0001", MLP_OUT, segment_size=24), [i for i in of_second if i < 2])
    store = actstore.open(blobs.url)
    assert store.n_sequences_committed == store.committed_rows().sum()


def test_info_of_one_run_has_no_table_of_runs(store: LocalBlobs) -> None:
    assert "runs" not in run("info", store.url)
    store.delete(commit_key("0000", 1))
    assert json.loads(run("info", store.url, "--json"))["n_sequences_committed"] == N


def test_globs_choose_hooks(store: LocalBlobs) -> None:
    lines = run("stats", store.url, "blocks.*.hook_resid_post", RESID_0).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(HOOKS[:2])


def test_glob_that_nothing_matches(store: LocalBlobs) -> None:
    done = command_here("stats", store.url, "blocks.*.hook_mlp_out")
    assert done.returncode == 1
    assert "does not hold 'blocks.*.hook_mlp_out'; it holds" in done.stderr
