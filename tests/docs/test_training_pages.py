"""The pages on training: their Python and their commands, run in order on the store of the demo."""

import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner

import actstore
from actstore.cli.main import cli
from actstore.demo import MODEL_PATH, TEXT_PATH

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


@pytest.fixture
def demo(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the store of the demo in it."""
    monkeypatch.chdir(demo_folder)
    return demo_folder


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store where ``actstore demo`` makes one, with a quarter of its tokens."""
    folder = tmp_path_factory.mktemp("demo")
    job = actstore.plan(
        model=str(MODEL_PATH),
        tokens=str(TEXT_PATH),
        documents="paragraph",
        hooks=["blocks.*.hook_resid_post"],
        context_length=128,
        max_tokens=12_800,
        out=str(folder / "actstore-demo/store"),
    )
    actstore.extract(job)
    # Another model over the same tokens would be another such store.
    shutil.copytree(folder / "actstore-demo/store", folder / "actstore-demo/tuned")
    return folder


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
