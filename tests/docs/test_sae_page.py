"""The page on an SAE of a real model from S3, run as it stands, and with small numbers for speed."""

import contextlib
import io
import re
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from actstore.cli.main import cli
from actstore.demo import TEXT_PATH
from tests.docs.test_hooks_pages import DOCS, FENCED, NUMBER

SMALL: Final = {
    "--max-tokens 204_800": "--max-tokens 6_144",
    "blocks.7.": "blocks.2.",
    "total_training_samples=600_000": "total_training_samples=60_000",
    "train_batch_size_samples=2048": "train_batch_size_samples=512",
    "d_sae=3072": "d_sae=768",
    "n_sequences=12": "n_sequences=2",
}


def run_page(replaced: Mapping[str, str]) -> tuple[dict[str, Any], str, str]:
    """Run the page; returns the names that it defines, its output, and the output that it shows."""
    text = (DOCS / "sae.md").read_text(encoding="utf-8")
    for name, place in replaced.items():
        assert name in text
        text = text.replace(name, place)
    names: dict[str, Any] = {}
    printed, shown = io.StringIO(), ""
    for language, block in FENCED.findall(text):
        if language == "bash":
            _, *args = shlex.split(block.replace("\\\n", ""))
            done = CliRunner().invoke(cli, args, catch_exceptions=False)
            assert done.exit_code == 0, done.output
        elif language == "python":
            with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
                warnings.simplefilter("ignore")  # from SAELens itself
                exec(compile(block, "sae.md", "exec"), names)
        else:
            shown += block
    return names, printed.getvalue(), shown


@pytest.fixture
def places(smollm2: Path, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replacements for the names of places in the page; the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    return {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(smollm2),
        "shakespeare.txt": str(TEXT_PATH),
        "s3://my-bucket/smollm2": s3_url,
    }


@pytest.mark.faults
def test_small(places: dict[str, str], tmp_path: Path) -> None:
    names, printed, shown = run_page(places | SMALL)
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    checkpoints = names["checkpoints"]
    curve = [one.explained_variance for one in checkpoints]
    assert len(curve) >= 12
    assert curve[0] < curve[-1] - 0.05
    assert 0.3 < curve[-1] < 1
    assert curve[-1] == pytest.approx(names["figures"].explained_variance)
    table = pq.read_table(tmp_path / "checkpoints.parquet")
    assert table["explained_variance"].to_pylist() == curve
    assert 0 < names["figures"].losses.recovered < 1
    assert (tmp_path / "sae.png").read_bytes().startswith(b"\x89PNG")
    assert any((tmp_path / "cache").rglob("c.*"))


@pytest.mark.soak
def test_as_it_stands(places: dict[str, str]) -> None:
    names, printed, shown = run_page(places)
    ours, shown_ones = (re.findall(r"0\.\d+", text) for text in (printed, shown))
    assert list(map(float, ours)) == pytest.approx(list(map(float, shown_ones)), abs=0.02)
    assert names["checkpoints"][-1].explained_variance == pytest.approx(float(ours[0]), abs=1e-3)
