"""How a command ends: its exit code, and what it prints when another process ends it."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from actstore.cli.commands import info
from actstore.cli.commands.verify import DAMAGED
from actstore.cli.main import _COMMANDS, RESUMABLE, cli, run
from actstore.facade import Store
from actstore.opening import open_store
from actstore.storage.local import LocalBlobs
from actstore.store.locking.turns import repairing, writing
from actstore.store.records.commit import plan_key
from tests.store.example import HOOKS, example_plan, example_values, write_store


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def store(tmp_path: Path) -> LocalBlobs:
    blobs, plan = LocalBlobs(tmp_path / "store"), example_plan()
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    return blobs


@pytest.mark.parametrize(
    ("args", "code"),
    [(["info"], 0), (["verify"], 0), (["slice", "--format", "npy"], 0), (["verify", "damaged"], DAMAGED)],
    ids=lambda arg: " ".join(arg) if isinstance(arg, list) else None,
)
def test_a_reader_that_has_left_changes_nothing(
    store: LocalBlobs,
    args: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The reader leaves, as in ``actstore info ... | true``. A damaged store gives its exit code all the same."""
    command, *options = args
    if options == ["damaged"]:
        options = []
        store.path(plan_key("0000")).write_bytes(b"damaged")
    hook = [HOOKS[0]] if command == "slice" else []
    reading, writing_end = os.pipe()
    os.close(reading)
    with open(writing_end, "w") as out:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", out)
        assert run([command, store.url, *hook, *options]) == code
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("args", [("verify", "--repair"), ("verify", "--repair", "--json")])
def test_who_only_has_to_wait_is_told_so_by_the_exit_code(
    store: LocalBlobs, args: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with writing(store):
        assert run([args[0], store.url, *args[1:]]) == RESUMABLE == 75
    assert "is being written to by" in capsys.readouterr().err
    with repairing(store):
        assert run([args[0], store.url, *args[1:]]) == RESUMABLE
    assert "is being repaired by" in capsys.readouterr().err


def test_what_will_not_mend_itself_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert run(["info"]) == 2


def test_a_command_that_is_terminated_can_be_run_again(
    store: LocalBlobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # only for this test, in case the command ignores the signal

    def open_late(url: str) -> Store:
        os.kill(os.getpid(), signal.SIGTERM)
        return open_store(url)

    monkeypatch.setattr(info, "open_store", open_late)
    assert run(["info", store.url]) == RESUMABLE
    ended = capsys.readouterr()
    assert ended.out == ""
    assert ended.err == "terminated; what is committed stays, and the same command continues from there\n"


@pytest.mark.parametrize("name", _COMMANDS)
def test_the_list_of_commands_says_what_each_says_of_itself(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert (command.help or "").split(". ")[0].split("\n")[0].rstrip(".") + "." == _COMMANDS[name]
