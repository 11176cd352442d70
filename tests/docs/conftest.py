"""What the pages are run on: a store as ``actstore demo`` makes it, only smaller."""

import shutil
from pathlib import Path

import pytest

import actstore
from actstore.demo import MODEL_PATH, TEXT_PATH


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
        hooks=["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"],
        context_length=128,
        max_tokens=12_800,
        out=str(folder / "actstore-demo/store"),
    )
    actstore.extract(job)
    # Another model over the same tokens would be another such store.
    shutil.copytree(folder / "actstore-demo/store", folder / "actstore-demo/tuned")
    return folder
