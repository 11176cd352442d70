"""The store on which the pages are run, made like that of ``actstore demo`` but smaller."""

import shutil
from pathlib import Path

import pytest

import actstore
from actstore.demo import MODEL_PATH, TEXT_PATH


@pytest.fixture
def demo(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with the store of the demo in it."""
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
        hooks=["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"],
        context_length=128,
        max_tokens=12_800,
        out=str(folder / "actstore-demo/store"),
    )
    actstore.extract(job)
    # Without it, another model over the same tokens would count as the same store.
    shutil.copytree(folder / "actstore-demo/store", folder / "actstore-demo/tuned")
    return folder
