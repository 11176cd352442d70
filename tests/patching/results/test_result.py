"""Results of patching: shares of an effect, tables that are read back, and pictures that show the numbers."""

import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from actstore.errors import MissingExtraError, PatchError
from actstore.patching import Axis, PatchResult

LABELS = ("0: <script>alert(1)</script>", "1: $x$", '2: "quoted"')
VALUES = torch.tensor([[1.0, 2.0, 3.0], [1.0, 4.0, 0.0]])


def result(values: torch.Tensor = VALUES, **fields: object) -> PatchResult:
    arguments: dict[str, object] = {
        "values": values,
        "axes": (Axis("layer", ("0", "1")), Axis("pos", LABELS)),
        "hook": "resid_pre",
        "model_name": "a<b",
        "corrupted": torch.tensor(1.0),
        "clean": torch.tensor(3.0),
        "engine": "packed rows",
        "noise_floor": 1e-6,
        "n_skipped": 2,
        "seconds": 0.5,
    }
    return PatchResult(**(arguments | fields))  # type: ignore[arg-type]


def test_effects_are_shares_of_the_way_to_the_clean_run() -> None:
    torch.testing.assert_close(result().effect, torch.tensor([[0.0, 0.5, 1.0], [0.0, 1.5, -0.5]]))
    both = torch.stack([VALUES, 10 * VALUES])
    of_two = result(
        both,
        axes=(Axis("prompt", ("0", "1")), *result().axes),
        corrupted=torch.tensor([1.0, 10.0]),
        clean=torch.tensor([3.0, 30.0]),
    )
    torch.testing.assert_close(of_two.effect, torch.stack([result().effect] * 2))
    torch.testing.assert_close(of_two.difference[1], 10 * VALUES - 10)
    with pytest.raises(PatchError, match="the metric of the clean run is not known"):
        _ = result(clean=None).effect
    with pytest.raises(PatchError, match="have the same metric"):
        _ = result(clean=torch.tensor(1.0)).effect


def test_the_cells_that_change_most_come_first() -> None:
    assert result().top(3) == [(("1", LABELS[1]), 3.0), (("0", LABELS[2]), 2.0), (("0", LABELS[1]), 1.0)]
    assert result(clean=None).top(1) == result().top(1)
    assert len(result().top(100)) == 6


@pytest.mark.parametrize("clean", [torch.tensor(3.0), None])
def test_a_table_is_read_back_and_others_can_read_it(tmp_path: Path, clean: torch.Tensor | None) -> None:
    original = result(clean=clean)
    original.save(tmp_path / "grid.parquet")
    again = PatchResult.load(tmp_path / "grid.parquet")
    for name, value in vars(original).items():
        other = getattr(again, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name
    table = pq.read_table(tmp_path / "grid.parquet")
    assert table["layer"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert table["pos_label"].to_pylist() == [*LABELS, *LABELS]
    assert table["value"].to_pylist() == VALUES.flatten().tolist()
    assert ("effect" in table.column_names) == (clean is not None)


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"there is no file .*none\.parquet"):
        PatchResult.load(tmp_path / "none.parquet")
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"value": [1.0]}), path)
    with pytest.raises(PatchError, match="is no result of patching"):
        PatchResult.load(path)
    path.write_bytes(b"text")
    with pytest.raises(PatchError, match="cannot be read as Parquet"):
        PatchResult.load(path)
    result().save(path)
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 4), path)
    with pytest.raises(PatchError, match="is damaged as a result of patching"):
        PatchResult.load(path)
    with pytest.raises(PatchError, match=r"ends with '\.csv'; choose \.parquet, \.png or \.html"):
        result().save(tmp_path / "grid.csv")


class _Cells(HTMLParser):
    """The titles and colours of cells, and the names of all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        attributes = dict(attrs)
        if tag == "td":
            self.cells.append((attributes["title"] or "", attributes["style"] or ""))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_shows_every_number_and_runs_nothing(tmp_path: Path) -> None:
    result().save(tmp_path / "grid.html")
    cells = _Cells()
    cells.feed((tmp_path / "grid.html").read_text())
    titles = [title for title, _ in cells.cells]
    # The last layer is on top.
    assert titles[:3] == [
        f"layer 1, pos {label}: {share}" for label, share in zip(LABELS, ("0", "1.5", "-0.5"), strict=True)
    ]
    assert len(titles) == 6
    assert cells.cells[1][1] == "background:rgb(33,102,172)"  # the largest is the deepest blue
    assert cells.cells[0][1] == "background:rgb(255,255,255)"
    assert cells.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert "resid_pre of a<b" in cells.text
    assert result()._repr_html_() in (tmp_path / "grid.html").read_text()


def test_a_picture_has_a_cell_for_each_number(tmp_path: Path) -> None:
    figure = result().plot(tmp_path / "grid.png")
    (image,) = figure.axes[0].images
    np.testing.assert_allclose(image.get_array(), result().effect)
    assert image.get_clim() == (-1.5, 1.5)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("place", ["rows", "columns", "panels", "model"])
def test_texts_of_tokens_are_drawn_as_they_are(tmp_path: Path, place: str) -> None:
    """Two dollars are no formula, a line break does not break the line, and characters without a glyph no rule."""
    texts = ("0: $^{$", "1: \n\n", "2: \x10\x00", "3: \u65e5$x$")
    shown = [r"0: $^{$", r"1: \n\n", r"2: \x10\x00", "3: \u65e5$x$"]
    numbers = ("0", "1", "2", "3")
    labels = {name: texts if place == name else numbers for name in ("rows", "panels", "columns")}
    names = {"rows": "sender", "panels": "dest_pos", "columns": "src_pos"}
    axes = tuple(Axis(names[name], its_labels) for name, its_labels in labels.items())
    grid = result(
        torch.randn(4, 4, 4), axes=axes, clean=None, model_name="".join(texts) if place == "model" else "m"
    )
    figure = grid.plot(tmp_path / "grid.png")
    drawn = {
        "rows": [tick.get_text() for tick in figure.axes[0].get_yticklabels()],
        "columns": [tick.get_text() for tick in figure.axes[0].get_xticklabels()],
        "panels": [axes.get_title().removeprefix("dest_pos ") for axes in figure.axes[:4]],
        "model": [figure.get_suptitle().split("\n")[0].removeprefix("resid_pre of ")],
    }
    plain = {name: [text.replace(r"\$", "$") for text in its_texts] for name, its_texts in drawn.items()}
    expected = {name: list(numbers) for name in names} | {"model": ["m"]}
    assert plain == expected | {place: ["".join(shown)] if place == "model" else shown}


def test_one_row_has_its_label_alone() -> None:
    figure = result(torch.ones(1, 1), axes=(Axis("sender", ("0.3",)), Axis("pos", ("0",))), clean=None).plot()
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["0.3"]


def test_axes_between_become_panels_and_only_the_strongest_are_drawn() -> None:
    values = torch.zeros(2, 30, 4)
    values[0, 17, 2] = 5.0
    axes = (
        Axis("layer", ("0", "1")),
        Axis("pos", tuple(map(str, range(30)))),
        Axis("head", tuple(map(str, range(4)))),
    )
    panels = result(values, axes=axes, corrupted=torch.tensor(0.0), clean=None)._panels()
    assert panels.values.shape == (24, 2, 4)
    assert panels.note == "the 24 of 30 with the largest values"
    assert panels.values[panels.titles.index("pos 17"), 0, 2] == 5.0


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'actstore\[plot\]'"):
        result().plot()
