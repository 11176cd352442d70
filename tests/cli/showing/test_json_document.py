"""What ``--json`` prints can be read by any parser of JSON."""

import json
import re
from pathlib import Path

import pytest

import actstore.cli
from actstore.cli.showing.json_document import print_json


def refuse(literal: str) -> None:
    raise AssertionError(f"{literal} is not JSON")


def test_what_is_not_finite_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"a": float("nan"), "b": [1.5, float("inf"), {"c": (float("-inf"), "NaN", None, True, 3)}]}
    print_json(document)
    expected = {"a": None, "b": [1.5, None, {"c": [None, "NaN", None, True, 3]}]}
    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == expected


def test_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"rate": float("inf"), "n": [1, 2]}, indent=None, err=True)
    assert capsys.readouterr() == ("", '{"rate": null, "n": [1, 2]}\n')


def test_no_command_prints_json_in_another_way() -> None:
    folder = Path(actstore.cli.__file__).parent
    files = [file for file in folder.rglob("*.py") if file.name != "json_document.py"]
    printing = [
        str(file.relative_to(folder))
        for file in files
        if re.search(r"echo\(\s*json\.dumps", file.read_text(encoding="utf-8"))
    ]
    assert len(files) > 30
    assert not printing
