"""The page on chats: its Python and its commands, run in order on a local copy of the model."""

from pathlib import Path

import pytest

from tests.docs.pages import run_page


def test_chats(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page("chat.md", smollm2)
