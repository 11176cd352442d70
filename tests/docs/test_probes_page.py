"""The page on probes: with few prompts and layers in every run, and all of it, as it is shown, in `make faults`."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from actstore.analysis import Probe
from actstore.cli.main import cli
from tests.docs.pages import run_page
from tests.docs.test_hooks_pages import DOCS, FENCED, NAME

_FEWER = {
    "N_PROMPTS = 2_000": "N_PROMPTS = 120",
    "blocks.*.hook_resid_post": "blocks.*5.hook_resid_post",
    "blocks.0.": "blocks.5.",
}
"""And layers 5, 15 and 25 alone."""


def test_probes_with_few_prompts(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "probes.md").read_text(encoding="utf-8").replace(NAME, str(smollm2))
    for before, after in _FEWER.items():
        assert before in page
        page = page.replace(before, after)
    names: dict[str, Any] = {}
    for language, block in FENCED.findall(page):
        if language == "python":
            exec(compile(block, "probes.md", "exec"), names)
        elif language == "sh":
            for line in block.splitlines():
                done = CliRunner().invoke(cli, shlex.split(line)[1:], catch_exceptions=False)
                assert done.exit_code == 0, done.output
    assert len(names["prompts"]) == 120
    layers = pd.read_parquet("layers.parquet")
    assert len(layers) == 3
    assert layers.n_train_rows[0] + layers.n_held_out_rows[0] == 120
    assert len(list(Path("probes").glob("*.safetensors"))) == 3
    assert Path("probes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.faults
def test_probes(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page says of verse and prose is so."""
    monkeypatch.chdir(tmp_path)
    names = run_page("probes.md", smollm2)
    layers = names["layers"]
    # "Neighbouring layers differ by less than that; the early ones and the later ones do not."
    assert layers.accuracy_low.iloc[17:].max() > layers.accuracy_high.iloc[0]
    probe: Probe = names["probe"]
    assert probe.metrics["accuracy"].low > 0.5
