"""The page on prompts: its Python runs in order, and prints what the page shows."""

from pathlib import Path

import pytest

from tests.docs.test_coming_from import run_page


def test_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("prompts.md")
    assert names["report"].n_truncated == 2
