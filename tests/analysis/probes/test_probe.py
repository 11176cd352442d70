"""Probes and their results: predictions, directions, files, tables and pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from actstore import analysis, patching
from actstore.analysis import Probe, Probes
from actstore.errors import HookError, JobError, StorageError
from actstore.facade import Store
from tests.analysis.probes.stores import chances, store_of_rows, values_of
from tests.analysis.stores import HOOK, D

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"]


@pytest.fixture(scope="module")
def values() -> NDArray[np.float32]:
    return values_of()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, values: NDArray[np.float32]) -> Store:
    return store_of_rows(tmp_path_factory.mktemp("probe") / "store", values)


@pytest.fixture(scope="module")
def labels(values: NDArray[np.float32]) -> NDArray[Any]:
    return np.where(chances(values) > 0.5, "verse", "prose")


@pytest.fixture(scope="module")
def probes(store: Store, labels: NDArray[Any]) -> Probes:
    return analysis.fit_probe(store, HOOKS, labels, l2=(0.01, 0.1), n_bootstrap=50)


@pytest.fixture(scope="module")
def multinomial(store: Store, values: NDArray[np.float32]) -> Probe:
    three = np.digitize(chances(values), [-1, 1.5])
    return analysis.fit_probe(store, HOOK, three, "multinomial", l2=0.01, curve=())[0]


def test_direction_is_the_gradient_of_the_score(probes: Probes, values: NDArray[np.float32]) -> None:
    """In units of the hook, whatever was standardised."""
    probe, rows = probes[HOOK], values[0]
    direction = probe.as_direction()
    assert (direction.dtype, direction.shape) == (torch.float32, (D,))
    products = rows.astype(np.float64) @ direction.double().numpy()
    np.testing.assert_allclose(products + probe.bias[0], probe.scores(rows), rtol=1e-4, atol=1e-4)
    moved = probe.scores(rows + direction.numpy()) - probe.scores(rows)
    np.testing.assert_allclose(moved, float(direction.double().square().sum()), rtol=1e-3)
    assert probe.as_direction(normalise=True).norm() == pytest.approx(1.0)
    assert probes["blocks.1.attn.hook_z"].as_direction().shape == (2, D // 2)


def test_direction_finds_the_rows_with_the_highest_scores(
    store: Store, probes: Probes, values: NDArray[np.float32]
) -> None:
    probe = probes[HOOK]
    top = analysis.top_activations(store, HOOK, probe.as_direction(), k=5)
    scores = probe.scores(values.reshape(-1, D))
    best = np.argsort(-scores)[:5]
    np.testing.assert_array_equal(top.sequences[0] * 8 + top.positions[0], best)
    np.testing.assert_allclose(top.values[0] + probe.bias[0], scores[best], rtol=1e-4)


def test_direction_steers(probes: Probes) -> None:
    name, steer = patching.steering(probes[HOOK].as_direction(), HOOK, 2.0)
    value = torch.zeros(1, 3, D)
    assert name == HOOK
    point: Any = None  # only errors name it
    moved = steer(value, hook=point)
    torch.testing.assert_close(moved[0, 1], 2 * probes[HOOK].as_direction())


def test_predictions_are_labels(probes: Probes, multinomial: Probe, values: NDArray[np.float32]) -> None:
    probe, rows = probes[HOOK], values[:2].reshape(-1, D)
    expected = np.where(probe.scores(rows) > 0, "verse", "prose")
    np.testing.assert_array_equal(probe.predict(rows), expected)
    np.testing.assert_array_equal(probe.predict(torch.from_numpy(rows)), expected)
    np.testing.assert_array_equal(multinomial.predict(rows), multinomial.scores(rows).argmax(1))
    with pytest.raises(JobError, match=r"rows have the shape \[4, 3\]; the probe takes \[n, 16\]"):
        probe.scores(np.zeros((4, 3)))


def test_direction_of_a_class(multinomial: Probe) -> None:
    for output in range(3):
        expected = multinomial.weights[:, output].astype(np.float32)
        np.testing.assert_array_equal(multinomial.as_direction(output).numpy(), expected)
    with pytest.raises(JobError, match="give one of"):
        multinomial.as_direction()


def test_direction_of_two_classes_has_no_label(probes: Probes) -> None:
    with pytest.raises(JobError, match="has one direction; leave the label out"):
        probes[HOOK].as_direction("verse")


@pytest.mark.parametrize("which", ["logistic", "multinomial"])
def test_saved_probe_is_the_same(probes: Probes, multinomial: Probe, which: str, tmp_path: Path) -> None:
    probe = probes["blocks.1.attn.hook_z"] if which == "logistic" else multinomial
    probe.save(tmp_path / "probe.safetensors")
    again = Probe.load(tmp_path / "probe.safetensors")
    for name, value in vars(probe).items():
        other = getattr(again, name)
        if isinstance(value, np.ndarray):
            assert value.tobytes() == other.tobytes()
        else:
            assert value == other, name


def test_files_that_are_no_probes(probes: Probes, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no file"):
        Probe.load(tmp_path / "absent.safetensors")
    (file,) = probes_of(probes, 1).save(tmp_path / "probe.safetensors")
    data = file.read_bytes()
    for damaged in (data[:20], data[:-8], data.replace(b"shape", b"shqpe"), data.replace(b"[16]", b"[17]")):
        file.write_bytes(damaged)
        with pytest.raises(StorageError, match="is damaged as a probe"):
            Probe.load(file)
    file.write_bytes(data.replace(b"actstore.probe", b"actstore.prole"))
    with pytest.raises(StorageError, match="is no probe"):
        Probe.load(file)


def probes_of(probes: Probes, n: int) -> Probes:
    return Probes(**vars(probes) | {"probes": probes.probes[:n]})


def test_one_probe_stands_for_all(probes: Probes, values: NDArray[np.float32]) -> None:
    one = probes_of(probes, 1)
    rows = values[0]
    np.testing.assert_array_equal(one.scores(rows), probes[HOOK].scores(rows))
    np.testing.assert_array_equal(one.predict(rows), probes[HOOK].predict(rows))
    torch.testing.assert_close(one.as_direction(), probes[HOOK].as_direction())
    with pytest.raises(JobError, match="there are probes of 3 hooks; choose one"):
        probes.as_direction()
    with pytest.raises(
        HookError, match="there is no probe of 'blocks.9.hook_resid_post'; there are blocks.0"
    ):
        probes["blocks.9.hook_resid_post"]


def test_best_probe(probes: Probes) -> None:
    assert len(probes) == 3
    assert probes.best.metrics["accuracy"].value == max(one.metrics["accuracy"].value for one in probes)


def test_table_has_a_line_for_each_hook(probes: Probes, tmp_path: Path) -> None:
    probes.to_parquet(tmp_path / "probes.parquet")
    rows = pq.read_table(tmp_path / "probes.parquet").to_pylist()
    assert [row["hook"] for row in rows] == [probe.hook for probe in probes]
    for row, probe in zip(rows, probes, strict=True):
        for name, one in probe.metrics.items():
            assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == (one.value, one.low, one.high)
        assert row["baseline"] == probes.baseline
        assert dict(zip(row["curve_documents"], row["curve"], strict=True)) == probe.curve


def test_files_of_all_probes(probes: Probes, tmp_path: Path) -> None:
    files = probes.save(tmp_path / "probes")
    assert [file.name for file in files] == [f"{probe.hook}.safetensors" for probe in probes]
    assert Probe.load(files[1]).metrics == probes[1].metrics
    with pytest.raises(JobError, match="choose one by its hook"):
        probes.save(tmp_path / "one.safetensors")


def test_picture_shows_accuracy_intervals_and_baseline(probes: Probes, tmp_path: Path) -> None:
    figure = probes.plot(tmp_path / "probes.png")
    assert (tmp_path / "probes.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    line, baseline = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), [probe.metrics["accuracy"].value for probe in probes])
    assert baseline.get_ydata()[0] == probes.baseline
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(min(probe.metrics["accuracy"].low for probe in probes))
    assert heights.max() == pytest.approx(max(probe.metrics["accuracy"].high for probe in probes))
    both = Probes(**vars(probes) | {"probes": (probes[HOOKS[0]], probes[HOOKS[1]])})
    layers = both.plot().axes[0]
    assert [label.get_text() for label in layers.get_xticklabels()] == ["0", "1"]
    assert layers.get_xlabel() == "layer of hook_resid_post"


def test_texts(probes: Probes) -> None:
    assert "best blocks." in repr(probes)
    assert "right by always" in repr(probes)
    assert repr(probes[0]).startswith("<Probe logistic of blocks.0.hook_resid_post: accuracy 0.")
    assert len(str(probes).splitlines()) == 2 + 1 + 3
    page = probes._repr_html_()
    assert page.count("<tr>") == 4
    assert all(probe.hook in page for probe in probes)
