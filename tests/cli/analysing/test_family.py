"""The commands that scan a store take the same options, and the same job files."""

from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from actstore.cli.main import cli
from actstore.errors import JobError

COMMANDS = ("top", "probe", "pca", "dashboard", "evaluate-sae")
OF_SCANS = (
    *("--drop", "--seqpos", "--sequences", "--resume", "--executor", "--num-workers", "--ray-address"),
    *("--quiet", "--json", "--job"),
)
OF_FEATURES = ("--of", "--neurons", "--sae", "--features", "-k")


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def described(name: str, flags: tuple[str, ...]) -> dict[str, Any]:
    """All that a user sees of options."""
    options = {flag: param for param in command(name).params for flag in param.opts}
    context = click.Context(command(name))
    return {flag: options[flag].get_help_record(context) for flag in flags}


@pytest.mark.parametrize("name", COMMANDS[1:])
def test_options_of_scans_say_the_same(name: str) -> None:
    assert described(name, OF_SCANS) == described("top", OF_SCANS)


def test_options_of_features_say_the_same() -> None:
    assert described("dashboard", OF_FEATURES[:-1]) == described("top", OF_FEATURES[:-1])
    assert "-k" in described("dashboard", OF_FEATURES)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_has_a_short_option_for_a_file(name: str) -> None:
    assert all("-o" not in param.opts for param in command(name).params)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_job_file_is_the_same_as_the_command_line(name: str, tmp_path: Path) -> None:
    """With every option of scans, and what each command needs."""
    needed = {"labels": "label", "neurons": "3,17", "sae": "sae"}
    flags = {flag for param in command(name).params for flag in param.opts}
    chosen = {option: value for option, value in needed.items() if f"--{option}" in flags}
    args = ["runs/a", "--hook", "blocks.1.hook_resid_post", "--drop", "bos,13", "--seqpos", "1:"]
    args += ["--sequences", "0,2,5", "--resume", "kept", "--executor", "ray", "--num-workers", "4"]
    args += ["--ray-address", "auto", "--quiet", "--json"]
    args += [part for option, value in chosen.items() for part in (f"--{option}", value)]
    job = tmp_path / "job.yaml"
    job.write_text(
        "store: runs/a\nhook: blocks.1.hook_resid_post\ndrop: [bos, 13]\nseqpos: '1:'\nsequences: [0, 2, 5]\n"
        "resume: kept\nexecutor: ray\nnum-workers: 4\nray_address: auto\nquiet: true\njson: true\n"
        + "".join(f"{option}: {value}\n" for option, value in chosen.items())
    )
    module = import_module(f"actstore.cli.analysing.{name.replace('-', '_')}")
    by_line = command(name).make_context(name, args).params
    by_file = command(name).make_context(name, ["--job", str(job)]).params
    for params in (by_line, by_file):
        params["drop"] = module.scan_arguments(params)["drop"]
    assert by_file == by_line
    assert by_file["drop"] == ["bos", 13]
    over = command(name).make_context(name, ["--job", str(job), "--executor", "inline", "runs/b"]).params
    assert (over["executor"], over["url"]) == ("inline", "runs/b")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hooks: a\n", "hooks is not a field of a job of {name} (the nearest is hook)"),
        ("store: a\nurl: b\n", "{job} has both store and url, which are the same; keep one of them"),
        ("quiet: 3\n", "{job}: quiet is 3; it must be true or false"),
        ("num_workers: true\n", "{job}: num_workers is True; it must be text, a number or a list"),
        ("drop: {{a: 1}}\n", "{job}: drop is {{'a': 1}}; it must be text, a number or a list"),
    ],
    ids=["unknown", "two stores", "flag", "number", "mapping"],
)
def test_what_a_job_file_cannot_say(name: str, text: str, says: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text.format())
    with pytest.raises(JobError) as raised:
        CliRunner().invoke(cli, [name, "--job", str(job)], catch_exceptions=False)
    assert str(raised.value).endswith(says.format(name=name, job=job))


@pytest.mark.parametrize("name", ["top", "probe", "pca", "evaluate-sae"])
@pytest.mark.parametrize(
    ("file", "says"),
    [("table.txt", "must end with .*parquet"), ("no/such/table.parquet", "there is no folder")],
    ids=["suffix", "folder"],
)
def test_files_that_cannot_be_written_are_refused_first(name: str, file: str, says: str) -> None:
    with pytest.raises(click.UsageError, match=says):
        command(name).make_context(name, ["nowhere", "--out", file])
