"""Running a page of the documentation: its commands and its Python in order, against what it shows."""

import contextlib
import io
import shlex
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from actstore.cli.main import cli
from tests.docs.test_hooks_pages import DOCS, FENCED, NAME, assert_shown


def run_page(page: str, model: Path) -> dict[str, Any]:
    """Run a page in the current folder, and return the names that its Python has made.

    Args:
        page: file below ``docs``.
        model: folder that stands for the name of the model.
    """
    names: dict[str, Any] = {}
    printed = io.StringIO()
    for language, block in FENCED.findall((DOCS / page).read_text(encoding="utf-8")):
        block = block.replace(NAME, str(model))
        if language == "yaml":
            Path("job.yaml").write_text(block)
        elif language == "sh":
            for line in block.splitlines():
                program, *args = shlex.split(line)
                assert program == "actstore"
                done = CliRunner().invoke(cli, args, catch_exceptions=False)
                assert done.exit_code == 0, done.output
        elif language == "python":
            assert not printed.getvalue(), "the page does not show what was printed before:\n" + block
            with contextlib.redirect_stdout(printed):
                exec(compile(block, page, "exec"), names)
        else:
            assert_shown(printed.getvalue(), block)
            printed = io.StringIO()
    assert not printed.getvalue()
    return names
