"""Pictures of principal components: what is drawn, read back from the figure."""

from pathlib import Path

import numpy as np
import pytest

from actstore import analysis
from actstore.analysis.geometry.principal.sampled_rows import sampled_rows
from actstore.analysis.scanning.chosen_rows import ChosenRows
from actstore.errors import JobError, TokensError
from actstore.facade import Store

POST = "blocks.1.hook_resid_post"


def test_explained_variance_is_drawn(real_store: Store, tmp_path: Path) -> None:
    every = analysis.pca(real_store, "blocks.*.hook_resid_post", 4)
    figure = every.plot(tmp_path / "pca.png")
    assert (tmp_path / "pca.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    for line, one in zip(axes.lines, every.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), np.cumsum(one.explained_variance_ratio))


@pytest.mark.parametrize(("color", "n_legend"), [("label", 2), ("year", 0), ("position", 0)])
def test_rows_are_drawn_where_they_are(real_store: Store, color: str, n_legend: int) -> None:
    one = analysis.pca(real_store, POST, 2)
    figure = one.scatter(real_store, color=color, n_rows=200, seqpos=slice(1, None))
    drawn = np.concatenate([part.get_offsets() for part in figure.axes[1].collections])
    sample = sampled_rows(real_store, ChosenRows.of(real_store, seqpos=slice(1, None)), color, 200, 0)
    assert len(drawn) == len(sample.values) == 200
    places = one.transform(real_store[POST].at(sample.sequences, sample.positions)).numpy()
    np.testing.assert_allclose(drawn[np.lexsort(drawn.T)], places[np.lexsort(places.T)], rtol=1e-5)
    legend = figure.axes[1].get_legend()
    assert (0 if legend is None else len(legend.get_texts())) == n_legend


def test_sampled_rows_have_the_values_of_their_documents(real_store: Store) -> None:
    rows = ChosenRows.of(real_store, seqpos=slice(2, None), sequences=slice(10, 40))
    sample = sampled_rows(real_store, rows, "year", 50, 1)
    expected = real_store.per_sequence("year").to_numpy()[sample.sequences]
    assert sample.values.tolist() == expected.tolist()
    assert sample.positions.min() >= 2
    assert set(sample.sequences) <= set(range(10, 40))
    assert (sample.positions < np.asarray(real_store.lengths[:])[sample.sequences]).all()
    assert len(set(zip(sample.sequences, sample.positions, strict=True))) == 50


def test_pictures_that_cannot_be(real_store: Store) -> None:
    one = analysis.pca(real_store, POST, 2)
    with pytest.raises(TokensError, match="keeps no column speaker"):
        one.scatter(real_store, color="speaker")
    with pytest.raises(JobError, match="needs 2"):
        analysis.pca(real_store, POST, 1).scatter(real_store)
    with pytest.raises(JobError, match="n_rows is 0"):
        one.scatter(real_store, n_rows=0)
    with pytest.raises(JobError, match="seed is -1"):
        one.scatter(real_store, seed=-1)
