"""The page on patching jobs: its job, its commands and its Python, run in order on a local copy of the model."""

from pathlib import Path

import pytest

from tests.docs.pages import run_page


def test_patch_jobs(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("patch-jobs.md", smollm2)
    mean = names["mean"]
    assert mean.effect[:, :4].abs().max() < 1e-4  # the same tokens in both prompts
    assert mean.effect[:24, 4].min() > 0.5
    assert mean.effect[24:, -1].min() > 0.5
    assert mean.effect[:24, -1].max() < 0.5
