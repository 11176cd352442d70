"""The page on tokens: its Python, and the output below it."""

from pathlib import Path

import pytest

from tests.docs.test_coming_from import run_page


def test_kept_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("tokens.md")
    assert len(names["store"].lengths[:]) == 2
