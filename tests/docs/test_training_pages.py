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
"""What comes after it is run where there is a cluster, in tests/workers."""
FENCED: Final = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def actstore_command(line: str) -> None:
    program, *args = shlex.split(line)
    assert program == "actstore"
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def run_page(text: str) -> dict[str, Any]:
    """The names that it leaves behind."""
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SAELens, which are its own
        for language, block in FENCED.findall(text):
            if language == "python":
                exec(compile(block, "page", "exec"), names)
            else:
                for line in block.replace("\\\n", "").splitlines():
                    actstore_command(line)
    return names


def test_saelens(demo: Path) -> None:
    found = run_page((DOCS / "saelens.md").read_text(encoding="utf-8"))
    for trained in (found["sae"], found["whole"], *found["saes"].values()):
        assert trained.W_dec.isfinite().all()
    assert found["imported"][found["hook"]].dtype == found["torch"].bfloat16
    exported = actstore.open("imported-again")[found["hook"]][:]
    assert found["torch"].equal(exported, found["store"][found["hook"]][:])
    assert (demo / "sae-topk" / "sae_weights.safetensors").is_file()


def test_others(demo: Path) -> None:
    page, _ = (DOCS / "training-others.md").read_text(encoding="utf-8").split(RAY)
    found = run_page(page)
    assert found["batch"].shape[1] == 128
    assert found["base"].shape == found["tuned"].shape == (1024, 128)
    assert found["base"].equal(found["tuned"])  # here it is the same model
