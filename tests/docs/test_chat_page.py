"""The page on chats: its Python and its commands, run in order on a local copy of the model."""

import contextlib
import io
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from actstore.cli.main import cli
from tests.docs.test_hooks_pages import DOCS, FENCED, NAME, assert_shown


def test_chats(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    for language, block in FENCED.findall((DOCS / "chat.md").read_text(encoding="utf-8")):
        block = block.replace(NAME, str(smollm2))
        if language == "sh":
            for line in block.splitlines():
                program, *args = shlex.split(line)
                assert program == "actstore"
                done = CliRunner().invoke(cli, args, catch_exceptions=False)
                assert done.exit_code == 0, done.output
        elif language == "python":
            assert not printed.getvalue(), "the page does not show what was printed before:\n" + block
            with contextlib.redirect_stdout(printed):
                exec(compile(block, "chat.md", "exec"), names)
        else:
            assert_shown(printed.getvalue(), block)
            printed = io.StringIO()
    assert not printed.getvalue()
