"""The pages on training: their Python and their commands, run in order on the store of the demo."""

import re
import shlex
import warnings
from pathlib import Path
from typing import Any, Final

from click.testing import CliRunner

import actstore
from actstore.cli.main import cli

DOCS: Final = Path(__file__).parents[2] / "docs"
RAY: Final = "## Ray Data\n"
"""What follows this heading needs a cluster, and is run in tests/workers."""
FENCED: Final = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def actstore_command(line: str) -> None:
    program, *args = shlex.split(line)
    assert program == "actstore"
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def run_page(text: str) -> dict[str, Any]:
    """Run the Python and the commands of a page; returns the names that it defines."""
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from SAELens itself
        for language, block in FENCED.findall(text):
            if language == "python":
                exec(compile(block, "page", "exec"), names)
            else:
                for line in block.replace("\\\n", "").splitlines():
                    actstore_command(line)
    return names


def test_saelens(demo: Path) -> None:
    names = run_page((DOCS / "saelens.md").read_text(encoding="utf-8"))
    for trained in (names["sae"], names["whole"], *names["saes"].values()):
        assert trained.W_dec.isfinite().all()
    assert names["imported"][names["hook"]].dtype == names["torch"].bfloat16
    exported = actstore.open("imported-again")[names["hook"]][:]
    assert names["torch"].equal(exported, names["store"][names["hook"]][:])
    assert (demo / "sae-topk" / "sae_weights.safetensors").is_file()


def test_others(demo: Path) -> None:
    page, _ = (DOCS / "training-others.md").read_text(encoding="utf-8").split(RAY)
    names = run_page(page)
    assert names["batch"].shape[1] == 128
    assert names["base"].shape == names["tuned"].shape == (1024, 128)
    assert names["base"].equal(names["tuned"])  # here it is the same model
