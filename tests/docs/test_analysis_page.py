"""The page on analyses: its Python and its commands, run in order on the bundled model."""

from pathlib import Path

import pytest

from actstore.demo import MODEL_PATH
from tests.docs.pages import run_page


def test_analysis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("analysis.md", MODEL_PATH)
    # "Largest first", and what the texts of the page say is in them.
    assert (names["top"].values[:, :-1] >= names["top"].values[:, 1:]).all()
    assert names["lens"].top_tokens.shape == (2, 4)
    assert (tmp_path / "top.parquet").is_file()
