"""Lines of progress of analyses, as they are without a terminal."""

import re

import pytest

from actstore.analysis.sae_evaluation.losses import LossProgress
from actstore.analysis.scanning.scan import Progress
from actstore.cli.showing.analysis_progress import AnalysisProgress


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err.splitlines()


def test_all_steps_of_an_analysis_have_one_style(capsys: pytest.CaptureFixture[str]) -> None:
    with AnalysisProgress() as progress:
        progress.on_losses(LossProgress(512, 512, 2.0, 0.0))
        progress.on_progress(Progress(60, 60, 1800, 3.0, 0.0))
        on_page = progress.counting("writing pages", "wrote", "pages")
        for n_done in (1, 2, 3):
            on_page(n_done, 3)
    of_model, of_scan, of_pages = lines(capsys)
    assert of_model == "computed 100%: 512 of 512 tokens, 256 tokens/s, 0:00 left"
    assert of_scan == "scanned 100%: 60 of 60 sequences, 600 rows/s, 0:00 left"
    assert re.fullmatch(r"wrote 100%: 3 of 3 pages, [\d,]+\.\d pages/s, 0:00 left", of_pages)


def test_later_passes_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    with AnalysisProgress() as progress:
        for n_done in (30, 60, 30, 60):
            progress.on_progress(Progress(n_done, 60, 10, 1.0, None))
    first, second = lines(capsys)
    assert first == "scanned 100%: 60 of 60 sequences, 10 rows/s"
    assert second == "scanned 100%: 60 of 60 sequences (pass 2), 10 rows/s"


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with AnalysisProgress(quiet=True) as progress:
        progress.on_progress(Progress(60, 60, 1800, 3.0, 0.0))
        progress.counting("fitting", "fitted", "hooks")(1, 1)
    assert not lines(capsys)
