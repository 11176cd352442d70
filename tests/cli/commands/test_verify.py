"""``actstore verify``: exit codes for schedulers, and text for people."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import actstore
from actstore.cli.main import cli
from actstore.errors import UncheckedError
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import commit_key, plan_key
from actstore.store.records.manifest import MANIFEST_KEY
from tests.commands import command, command_here
from tests.extraction.test_verify import HOOK, SHARD, change_row
from tests.store.verifying.test_verify import RUN, flip, make_store

Fields = dict[str, Any]


STORED = "acts/blocks.0.hook_resid_post/c.1.0.0"


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["verify", *args], catch_exceptions=False)


@pytest.fixture
def store(tmp_path: Path) -> LocalBlobs:
    blobs = LocalBlobs(tmp_path / "store")
    make_store(blobs)
    return blobs


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extracted") / "store"


@pytest.fixture
def real(fields: Fields, extracted: Path) -> str:
    """A store of a tiny model, extracted once and copied for each test."""
    if not extracted.exists():
        actstore.extract(actstore.plan(**fields | {"out": str(extracted)}))
    shutil.copytree(extracted, fields["out"])
    return str(fields["out"])


def test_whole_store(store: LocalBlobs) -> None:
    done = run(store.url)
    assert done.exit_code == 0
    assert f"{store.url} (clean)" in done.stdout
    assert "3 of 3 committed" in done.stdout
    assert "31 objects" in done.stdout
    assert "next" not in done.stdout


def test_json_for_schedulers(store: LocalBlobs) -> None:
    done = run(store.url, "--json", "--quiet")
    assert (done.exit_code, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert (printed["is_clean"], printed["is_complete"], printed["findings"]) == (True, True, [])
    assert (printed["n_segments"], printed["n_committed"], printed["n_objects"]) == (3, 3, 31)


def test_damaged_store(store: LocalBlobs) -> None:
    store.delete("acts/blocks.0.hook_resid_post/c.1.0.0")
    done = run(store.url, "--quiet")
    assert done.exit_code == 3
    assert "(DAMAGED: 1 finding)" in done.stdout
    assert "damage: acts/blocks.0.hook_resid_post/c.1.0.0 is missing" in done.stdout
    assert f"actstore verify {store.url} --repair, then the same extraction again" in done.stdout
    (finding,) = json.loads(run(store.url, "--json", "--quiet").stdout)["findings"]
    assert finding == {
        "key": "acts/blocks.0.hook_resid_post/c.1.0.0",
        "problem": "is missing",
        "run": "0000",
        "segment": 1,
        "severity": "damage",
        "is_repairable": True,
    }


def test_store_that_is_not_complete(store: LocalBlobs) -> None:
    for key in (MANIFEST_KEY, commit_key(RUN, 1)):
        store.delete(key)
    done = run(store.url, "--quiet")
    assert done.exit_code == 75
    assert "2 of 3 committed" in done.stdout
    assert (
        "the same extraction again, for what is not complete: run 0000 (blocks.*.hook_resid_post and "
        in done.stdout
    )


def test_repair(store: LocalBlobs) -> None:
    flip(store, STORED, 5)
    done = run(store.url, "--repair", "--quiet")
    assert done.exit_code == 3  # the damage is reported, although it was repaired
    assert "4 objects removed; run the extraction again to make them again" in done.stdout
    assert run(store.url, "--quiet").exit_code == 75


def test_what_cannot_be_repaired_is_said(store: LocalBlobs) -> None:
    store.delete(MANIFEST_KEY)
    flip(store, plan_key(RUN), 99)
    for option in ("--quiet", "--repair"):
        done = run(store.url, option)
        assert done.exit_code == 3
        assert "cannot be repaired" in done.stdout
        assert "--repair, then" not in done.stdout


def test_no_store(tmp_path: Path) -> None:
    done = command("verify", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: there is no actstore store at {tmp_path}")


def test_model_is_run_again(real: str) -> None:
    done = run(real, "--deep", "--sequences", "5", "--quiet")
    assert done.exit_code == 0, done.stdout
    assert "5 sequences computed again and compared" in done.stdout
    change_row(real)
    assert run(real, "--quiet").exit_code == 0
    done = run(real, "--deep", "--sequences", "100", "--quiet")
    assert done.exit_code == 3
    assert f"damage: {SHARD} is not what the model computes: {HOOK} of sequence 32" in done.stdout


def test_the_older_name_of_sequences(real: str) -> None:
    done = run(real, "--deep", "--rows", "5", "--quiet")
    assert done.exit_code == 0, done.stdout
    assert "5 sequences computed again and compared" in done.stdout
    shown = run("--help").stdout
    assert "--sequences" in shown
    assert "--rows" not in shown


def test_model_that_is_elsewhere(real: str, tiny_model: Any, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model("llama"), moved)
    assert run(real, "--deep", "--sequences", "2", "--model", str(moved), "--quiet").exit_code == 0
    done = command_here("verify", real, "--deep", "--model", str(tiny_model("gpt2")), "--quiet")
    assert done.returncode == 1
    assert "use the same model files everywhere" in done.stderr


def test_exit_codes_of_the_program_itself(store: LocalBlobs) -> None:
    assert command_here("verify", store.url).returncode == 0
    flip(store, STORED, 5)
    assert command("verify", store.url).returncode == 3
    assert command_here("verify", store.url, "--repair").returncode == 3
    done = command("verify", store.url)
    assert done.returncode == 75
    assert f"run {RUN} (" in done.stdout
    assert "has 2 of 3 segments" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_read_is_not_damaged(store: LocalBlobs) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(store.root, f"{folder}/store")
        Path(folder).chmod(0o755)
        # The user who repairs may write here, but cannot read that one shard.
        for path in (Path(folder), *Path(folder).rglob("*")):
            os.chown(path, 65534, -1)
        shard = Path(folder, "store", STORED)
        os.chown(shard, 0, 0)
        shard.chmod(0)
        os.seteuid(65534)  # nobody
        try:
            with pytest.raises(
                UncheckedError, match="cannot be read: no permission; give this user the right"
            ):
                actstore.verify(f"{folder}/store", repair=True)
        finally:
            os.seteuid(0)
        assert shard.exists()
