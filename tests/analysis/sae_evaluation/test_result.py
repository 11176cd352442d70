"""Figures as tables and pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from actstore.analysis.sae_evaluation.figures import LOSSES, SCALARS, SaeFigures
from actstore.analysis.sae_evaluation.result import SaeEvaluation
from actstore.errors import JobError
from actstore.patching.loss_recovered import LossRecovered

LOST = LossRecovered("blocks.0.hook_resid_post", 3.0, 3.5, 11.0, 7.0, 0.25, 8.0, 4.0, 63)


def figures(name: str, n_samples: int | None, losses: LossRecovered | None = None) -> SaeFigures:
    numbers = (0.875, 0.5, 12.5, 0.75, 0.9375, 0.96875, 2.25, 30.5)
    active = np.array([0, 1, 30, 100, 0, 10])
    return SaeFigures(name, n_samples, 6, *numbers, n_rows=100, n_active=active, losses=losses)


@pytest.fixture
def evaluation() -> SaeEvaluation:
    saes = (figures("900", 900), figures("<b>", None, LOST))
    return SaeEvaluation("blocks.0.hook_resid_post", saes, 100, 2, "/store", 1.0)


def test_features_by_how_often_they_are_active() -> None:
    one = figures("sae", None)
    assert one.dead_features.tolist() == [0, 4]
    assert one.dense_features.tolist() == [2, 3]
    assert replace(one, dense_above=0.05).dense_features.tolist() == [2, 3, 5]
    counts, edges = one.density_histogram(4)
    assert counts.sum() == 4, "without the dead ones"
    assert (edges[0], edges[-1]) == (pytest.approx(0.005), 1.0)
    expected, _ = np.histogram(np.log([0.01, 0.3, 1.0, 0.1]), np.linspace(np.log(0.005), 0, 5))
    np.testing.assert_array_equal(counts, expected)


def test_by_place_and_by_name(evaluation: SaeEvaluation) -> None:
    assert len(evaluation) == 2
    assert evaluation[0] is evaluation["900"] is next(iter(evaluation))
    assert evaluation[-1].name == "<b>"
    with pytest.raises(JobError, match="no SAE has the name x; there are 900, <b>"):
        evaluation["x"]


def test_parquet_and_pandas_have_one_row_an_sae(evaluation: SaeEvaluation, tmp_path: Path) -> None:
    evaluation.to_parquet(tmp_path / "saes.parquet")
    table = pq.read_table(tmp_path / "saes.parquet")
    frame = evaluation.to_pandas()
    names = [*SCALARS, "n_dead", "n_dense", *LOSSES]
    assert list(frame.columns) == names
    assert table.column_names == [*names, "dead_features", "dense_features", "density"]
    assert table["name"].to_pylist() == list(frame["name"]) == ["900", "<b>"]
    assert table["n_samples"].to_pylist() == [900, None]
    assert table["explained_variance"].to_pylist() == list(frame["explained_variance"]) == [0.875, 0.875]
    assert table["recovered"].to_pylist() == [None, pytest.approx((11 - 3.5) / (11 - 3))]
    assert table["kl_with_sae"].to_pylist() == [None, 0.25]
    assert table["dead_features"].to_pylist()[0] == [0, 4]
    assert table["density"].to_pylist()[1] == [0, 0.01, 0.3, 1, 0, 0.1]
    assert b"blocks.0.hook_resid_post" in table.schema.metadata[b"actstore.sae_evaluation"]


def test_text_and_html(evaluation: SaeEvaluation) -> None:
    title, head, first, second = repr(evaluation).splitlines()
    assert title == "SAEs of blocks.0.hook_resid_post, 100 rows, 2 more not finite"
    assert head.split()[:3] == ["SAE", "expl.", "var."]
    assert first.split() == [
        "900",
        "0.8750",
        "0.5000",
        "12.5",
        "0.9375",
        "0.7500",
        "2.25",
        "30.5",
        "2",
        "2",
        "6",
    ]
    assert second.split()[-4:] == ["0.9375", "3.5000", "3.0000", "0.2500"]
    page = evaluation._repr_html_()
    assert "<td>0.8750</td>" in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_picture_is_over_training_or_against_l0(evaluation: SaeEvaluation, tmp_path: Path) -> None:
    axes = evaluation.plot(tmp_path / "saes.png").axes
    assert (tmp_path / "saes.png").read_bytes().startswith(b"\x89PNG")
    assert [one.get_xlabel() for one in axes] == ["L0"]
    assert axes[0].collections[0].get_offsets().tolist() == [[2.25, 0.875]] * 2
    assert [text.get_text() for text in axes[0].texts] == ["900", "<b>"]
    checkpoints = replace(evaluation, saes=(figures("900", 900), figures("1800", 1800)))
    axes = checkpoints.plot().axes
    assert axes[0].get_xlabel() == "rows trained on"
    assert axes[0].lines[0].get_xydata().tolist() == [[900, 0.875], [1800, 0.875]]
    assert axes[1].lines[0].get_xydata().tolist() == [[900, 2.25], [1800, 2.25]]
