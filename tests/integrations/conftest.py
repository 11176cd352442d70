"""A store of the bundled model, and the libraries that read it."""

import shutil
import warnings
from pathlib import Path

import pytest

import actstore
from actstore.demo import MODEL_PATH
from actstore.facade import Store

with warnings.catch_warnings():
    # Warnings while it is imported are not under test.
    warnings.simplefilter("ignore")
    import sae_lens  # noqa: F401

LENGTH, N = 32, 256


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Store:
    """Three hooks over 256 sequences of 32 tokens, with covariance. The model that made it is deleted."""
    folder = tmp_path_factory.mktemp("saelens")
    shutil.copytree(MODEL_PATH, folder / "model")
    job = actstore.plan(
        model=str(folder / "model"),
        tokens=str(text_file),
        documents="paragraph",
        hooks=["blocks.2.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"],
        context_length=LENGTH,
        max_tokens=N * LENGTH,
        batch_size=32,
        segment_size=64,
        covariance=True,
        out=str(folder / "store"),
    )
    actstore.extract(job)
    shutil.rmtree(folder / "model")
    return actstore.open(str(folder / "store"))
