"""The pages on hooked models: their Python, run in order on a local copy; what they show, and what they say."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any, Final

import pytest

DOCS: Final = Path(__file__).parents[2] / "docs"
NAME: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
FENCED: Final = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NUMBER: Final = re.compile(r"[+-]?\d+(?:\.\d+)?")


def run_page(page: str, folder: Path) -> dict[str, Any]:
    """Run a page whose output is shown after each block that prints; the names that it leaves behind."""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert NAME in text
    names: dict[str, Any] = {}
    printed = io.StringIO()
    for language, block in FENCED.findall(text):
        if language == "python":
            assert not printed.getvalue(), "the page does not show what was printed before:\n" + block
            with contextlib.redirect_stdout(printed):
                exec(compile(block.replace(NAME, str(folder)), page, "exec"), names)
        else:
            assert_shown(printed.getvalue().replace(str(folder), NAME), block)
            printed = io.StringIO()
    assert not printed.getvalue()
    return names


def assert_shown(printed: str, shown: str) -> None:
    """Equal but for the last digit of numbers, which depend on the machine."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    for found, wanted in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        unit = 10.0 ** -len(wanted.partition(".")[2]) if "." in wanted else 0
        assert float(found) == pytest.approx(float(wanted), abs=max(1.1 * unit, 0.01 * bool(unit))), printed


def test_indirect_objects(smollm2: Path) -> None:
    found = run_page("ioi.md", smollm2)
    assert found["difference"].min() > 4
    assert found["logits"].shape[1] == 15
    assert (found["shares"].sum(0) + found["bias"] - found["difference"]).abs().max() < 1e-4
    best, second = found["by_head"].topk(2)[0]
    # "Two heads do most of it, and one works against them."
    assert best + second > 0.7 * found["difference"].mean()
    assert found["by_head"].min() < -1
    assert found["by_head"].sort()[0][1] > -0.2


def test_induction(smollm2: Path) -> None:
    found = run_page("induction.md", smollm2)
    scores = found["demo_scores"]
    assert scores.shape == (4, 4)
    assert scores[1].min() > 0.6
    assert scores[[0, 2, 3]].max() < 0.05
    assert found["scores"].shape == (30, 9)
    assert set((found["scores"].flatten().topk(4).indices // 9).tolist()) == {17, 18}
    assert found["second"] < found["first"] / 100
    assert found["residual"].shape == (1, 101, 576)


def test_patching(smollm2: Path) -> None:
    found = run_page("patching.md", smollm2)
    grid, estimate = found["grid"], found["estimate"]
    assert grid[:, :2].abs().max() < 1e-4  # the same tokens in both prompts
    assert grid[0, 5:].abs().max() < 1e-4
    assert (grid[3:24].argmax(1) == 3).all()  # "iffel" up to layer 23
    assert (grid[24:].argmax(1) == 9).all()  # the last word from layer 24 on
    assert found["by_head"].topk(2).indices.tolist() == [4, 5]
    assert estimate.shape == grid.shape
    assert not estimate.requires_grad
    assert not any(module._forward_hooks for module in found["model"].hf.modules())


def test_tokens_and_prompts(smollm2: Path) -> None:
    found = run_page("tokens-and-prompts.md", smollm2)
    assert (found["unmasked"] - found["alone"]).abs().max() > 1
