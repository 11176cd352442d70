"""``actstore patch`` as users meet it."""

import contextlib
import itertools
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from actstore import patching
from actstore.cli.commands.patch import patch_command
from actstore.patching.jobs.job import PatchJob, parse_job
from tests.commands import Command, command_here
from tests.patching.jobs.pairs_file import random_pairs, write_jsonl

TinyModel = Callable[..., Path]

# A shell gives its background jobs an ignored SIGINT, and Python keeps it so; a terminal does not.
COMMAND = """
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
from actstore.cli.main import main; main()
"""


@pytest.fixture
def options(tiny_model: TinyModel, tmp_path: Path) -> list[str]:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", random_pairs((7, 7, 7, 7, 7)))
    fields = {"model": tiny_model("gpt2"), "pairs": pairs, "part-size": 2, "out": tmp_path / "out"}
    return [text for name, value in fields.items() for text in (f"--{name}", str(value))]


def test_every_field_is_an_option_that_says_the_same() -> None:
    by_name = {option.name: option for option in patch_command.params}
    for name, field in PatchJob.model_fields.items():
        option = by_name[name]
        assert isinstance(option, click.Option)
        assert option.opts == [f"--{name.replace('_', '-')}"]
        assert str(option.help).startswith(str(field.description))
        if field.default not in (None, ...) and not field.is_required():
            default = field.default
            shown = ",".join(default) if isinstance(default, tuple) else str(default)
            assert f"Default: {shown}." in str(option.help) or name == "executor"


def test_patching_with_options(options: list[str], tmp_path: Path) -> None:
    done = command_here("patch", *options)
    assert done.returncode == 0, done.stderr
    assert "5 of 7 tokens" in done.stderr  # the plan, before anything starts
    assert "patched 100%: 5 of 5 pairs, " in done.stderr
    assert "pairs/s, 0:00 left" in done.stderr
    for part in ("complete: 3 parts", "105 of 5 pairs", "5 pairs as packed rows", "summary of 5 pairs"):
        assert part in done.stdout
    again = command_here("patch", *options, "--json", "--quiet")
    assert again.stderr == ""
    assert json.loads(again.stdout) == json.loads((tmp_path / "out/report.json").read_text())


def test_progress_as_json(options: list[str]) -> None:
    done = command_here("patch", *options, "--json")
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    # Parts that end at the same time may come in any order.
    assert {event["part"]: event["n_pairs"] for event in events} == {0: 2, 1: 2, 2: 1}
    done_so_far = list(itertools.accumulate(event["n_pairs"] for event in events))
    assert [event["n_pairs_done"] for event in events] == done_so_far
    assert events[0]["seconds_left"] > 0 == events[-1]["seconds_left"]
    assert json.loads(done.stdout)["n_pairs"] == 5


def test_a_dry_run_stores_nothing(options: list[str], tmp_path: Path) -> None:
    done = command_here("patch", *options, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "cells    105, 21 a pair" in done.stdout
    assert "time     about 0 min " in done.stdout
    figures = json.loads(command_here("patch", *options, "--dry-run", "--json").stdout)
    assert (figures["n_pairs"], figures["n_cells"], figures["n_parts"]) == (5, 105, 3)
    assert figures["estimate"]["seconds_left"] > 0
    assert not (tmp_path / "out").exists()


def test_a_job_file_and_options_that_take_precedence(options: list[str], tmp_path: Path) -> None:
    fields: dict[str, Any] = dict(
        zip((name[2:].replace("-", "_") for name in options[::2]), options[1::2], strict=True)
    )
    fields |= {"part_size": 2, "hook": "z", "axes": ["layer", "head"], "positions": [-1, -2]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(fields))
    more = ("--metric", "logit", "--positions", "-1", "--no-prepend-bos", "--limit", "2", "--quiet")
    done = command_here("patch", str(tmp_path / "job.yaml"), *more, "--json")
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "out/job.json").read_text())
    assert stored["axes"] == ["layer", "head"]
    assert (stored["metric"], stored["positions"], stored["n_pairs"]) == ("logit", [-1], 2)


def test_options_of_several_values() -> None:
    given: dict[str, Any] = {}

    def keep(job_file: str | None, **options: Any) -> None:
        from actstore.cli.options.model_options import given_fields

        given.update(given_fields(PatchJob, options))

    command = click.Command("patch", params=patch_command.params[:-3], callback=keep)
    args = ["--axes", "layer", "--axes", "pos", "--positions", "-1,3", "--prepend-bos"]
    command.main(args, standalone_mode=False)
    assert given == {"axes": "layer,pos", "positions": [-1, 3], "prepend_bos": True}
    job = parse_job({"model": "m", "pairs": "p", "out": "o"} | given)
    assert (job.axis_names, job.measured_positions) == (("layer", "pos"), (-1, 3))


def test_errors_are_one_line(options: list[str], tmp_path: Path) -> None:
    done = command_here("patch", *options, "--positions", "last")
    assert done.returncode == 1
    assert done.stderr == (
        "error: job: 1 problem: positions: should be an integer, or a list of integers, got 'last'\n"
    )
    assert command_here("patch", *options).returncode == 0
    done = command_here("patch", *options, "--metric", "logit")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "holds the results of another job: metric is logit_difference there" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_ctrl_c_leaves_the_parts_and_ends_soon(
    tiny_model: TinyModel, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    """A part here is one wave of many cells, so the interruption comes in the middle of one."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", random_pairs((30,) * 40))
    fields: dict[str, Any] = {
        "model": str(tiny_model("gpt2")),
        "pairs": pairs,
        "part_size": 4,
        "max_tokens": 1 << 20,
        "hook": "z",
        "axes": "layer,pos,head",
    }
    out = tmp_path / "out"
    options = [text for name, value in fields.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = Command("patch", *options, "--out", str(out), code=COMMAND, stdout=stderr, stderr=stderr)
    deadline = time.monotonic() + 120
    while not list((out / "parts").glob("*.parquet")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
    process.send_signal(sent)
    assert process.wait(60) == code
    text = log.read_text()
    assert "the same command continues from there" in text
    assert "Traceback" not in text
    before = {path.name: path.read_bytes() for path in (out / "parts").iterdir()}
    assert 1 <= len(before) < 10
    assert not (out / "report.json").exists()
    report = patching.run_job(**fields, out=str(out))
    assert report.n_parts_before == len(before)
    assert {name: (out / "parts" / name).read_bytes() for name in before} == before
