"""Every error of actstore is one line, whatever foreign text it contains."""

import re
from pathlib import Path

import pytest

import actstore
from actstore import errors
from actstore.reason import reason
from tests.commands import command

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_is_one_line(kind: type[Exception]) -> None:
    assert str(kind("it failed: one\n\n  two\r\nthree\u2028four\n")) == "it failed: one two three four"
    assert str(kind()) == ""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("one.\ntwo"), "one"),
        (ValueError("\n  \n two  words\n"), "two words"),
        (ValueError(), "ValueError"),
        (ValueError("\n"), "ValueError"),
        (KeyError("a\nb"), "a"),
        (OSError(2, "No such file", "/a"), "No such file"),
        (ValueError("x" * 1_000_000), "x" * 300 + "..."),
    ],
)
def test_reason_is_the_first_line_that_says_something(error: Exception, text: str) -> None:
    assert reason(error) == text


def test_only_one_place_cuts_foreign_text() -> None:
    folders = [Path(actstore.__file__).parent, Path(actstore.__file__).parents[1] / "workers"]
    sources = [path for folder in folders for path in folder.rglob("*.py") if path.name != "reason.py"]
    assert len(sources) > 150
    cuts = re.compile(r"str\((error|cause)\).{0,20}(splitlines|split\(\))")
    assert [path.name for path in sources if cuts.search(path.read_text(encoding="utf-8"))] == []


def test_internal_error_of_the_command_line_is_one_line() -> None:
    code = (
        "import sys, actstore.cli.main as main\n"
        "def broken(**_): raise RuntimeError('one\\ntwo')\n"
        "main.cli.main = broken\n"
        "sys.exit(main.run(['info']))"
    )
    ended = command(code=code)
    assert ended.returncode == 1
    assert ended.stderr == "internal error: RuntimeError: one (this is a bug; --debug shows where)\n"
