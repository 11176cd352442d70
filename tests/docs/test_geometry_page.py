"""The page on geometry: its commands and its Python run in order, and print what the page shows."""

from pathlib import Path

import pytest

from actstore import analysis
from actstore.demo import MODEL_PATH
from tests.docs.pages import run_page


def test_geometry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("geometry.md", MODEL_PATH)
    assert all(one.is_from_statistics for one in names["layers"].values())
    for picture in ("geometry.png", "layers.png", "cka.png", "norms.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    kept = analysis.PCAs.load("layers.safetensors")
    assert kept["blocks.2.hook_resid_post"].count == names["pca"].count
