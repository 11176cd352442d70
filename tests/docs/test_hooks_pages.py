"""The pages on hooked models: their Python runs in order on a local copy, and its output is what they show."""

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


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages write stores to the current folder."""
    monkeypatch.chdir(tmp_path)


def run_page(page: str, folder: Path) -> dict[str, Any]:
    """Run a page that shows the output after each block that prints; returns the names that it defines."""
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
    """Compare all but the last digit of numbers, which depends on the machine."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    for number, wanted in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        unit = 10.0 ** -len(wanted.partition(".")[2]) if "." in wanted else 0
        assert float(number) == pytest.approx(float(wanted), abs=max(1.1 * unit, 0.01 * bool(unit))), printed


def test_tour(smollm2: Path) -> None:
    names = run_page("tour.md", smollm2)
    assert names["by_layer"].argmax() == 30
    assert names["whole"].shape[-2:] == (49152, 49152)


def test_indirect_objects(smollm2: Path) -> None:
    names = run_page("ioi.md", smollm2)
    assert names["difference"].min() > 4
    assert names["logits"].shape[1] == 15
    assert (names["shares"].sum(0) + names["bias"] - names["difference"]).abs().max() < 1e-4
    best, second = names["by_head"].topk(2)[0]
    # "Two heads do most of it, and one works against them."
    assert best + second > 0.7 * names["difference"].mean()
    assert names["by_head"].min() < -1
    assert names["by_head"].sort()[0][1] > -0.2


def test_induction(smollm2: Path) -> None:
    names = run_page("induction.md", smollm2)
    scores = names["demo_scores"]
    assert scores.shape == (4, 4)
    assert scores[1].min() > 0.6
    assert scores[[0, 2, 3]].max() < 0.05
    assert names["scores"].shape == (30, 9)
    assert set((names["scores"].flatten().topk(4).indices // 9).tolist()) == {17, 18}
    assert names["second"] < names["first"] / 100
    assert names["residual"].shape == (1, 101, 576)
    store, top = names["store"], names["top"]
    for sequence, position in zip(top.sequences[2].tolist(), top.positions[2].tolist(), strict=True):
        source = int(store["pattern", 1][sequence, position, 2].argmax())
        # The head attends to what came after the same token.
        assert store.tokens[sequence, source - 1] == store.tokens[sequence, position]
        assert 0 < source < position


def test_patching(smollm2: Path) -> None:
    names = run_page("patching.md", smollm2)
    grid, estimates = names["grid"], names["estimates"]
    assert grid[:, :2].abs().max() < 1e-4  # the same tokens in both prompts
    assert grid[0, 5:].abs().max() < 1e-4
    assert (grid[3:24].argmax(1) == 3).all()  # "iffel" up to layer 23
    assert (grid[24:].argmax(1) == 9).all()  # the last word from layer 24 on
    assert names["by_head"].topk(2).indices.tolist() == [4, 5]
    for method in ("atp", "relp"):
        assert estimates[method]["resid_pre"].values.shape == grid.shape
        assert not estimates[method]["resid_pre"].values.requires_grad
    # Cells that were computed are those of the grid.
    some = names["some"]
    exact = names["exact"]["mlp_out"].values
    assert (some.values - exact)[some.is_exact].abs().max() < 1e-3
    # "MLPs have written the city at 'iffel', and the head moves it by its values."
    assert names["read"].effect[0, 2] > 0.7
    assert names["read"].effect.flatten()[[0, 1, 3, 4, 5]].abs().max() < 0.2
    assert names["means"].values[2] < 0 < 2.9 < names["means"].values[3]
    assert not any(module._forward_hooks for module in names["model"].hf.modules())


def test_tokens_and_prompts(smollm2: Path) -> None:
    names = run_page("tokens-and-prompts.md", smollm2)
    assert (names["unmasked"] - names["alone"]).abs().max() > 1
