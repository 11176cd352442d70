"""Fitted probes: equal to scikit-learn on the same rows, and the same bits however the rows come."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, r2_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from actstore import analysis
from actstore.analysis.probes.planning import held_nbytes, working_nbytes
from actstore.analysis.probes.results import Probes
from actstore.analysis.probes.rows.labels import labels_of
from actstore.analysis.probes.rows.passes import ColumnSums, HeldOutScores, Losses, Problem, Products, Targets
from actstore.analysis.probes.rows.splits import HELD_OUT, split_of
from actstore.analysis.scanning import unit as unit_module
from actstore.analysis.scanning.scan import Progress, scan
from actstore.errors import HookError, JobError
from actstore.facade import Store
from tests.analysis.probes.stores import WIDTH, N, chances, store_of_rows, values_of
from tests.analysis.stores import HOOK, D, store_of

OTHER = "blocks.1.hook_resid_post"
TIGHT: Any = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def values() -> NDArray[np.float32]:
    return values_of()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, values: NDArray[np.float32]) -> Store:
    return store_of_rows(tmp_path_factory.mktemp("probes") / "store", values)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(unit_module, "_UNIT_ROWS", 96)


@pytest.fixture(scope="module")
def two(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Labels by token; some have none."""
    labels = (chances(values) > 0.5).astype(np.int64)
    labels[::7, 2:5] = -1
    return labels


@pytest.fixture(scope="module")
def three(values: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.digitize(chances(values), [-1, 1.5]).astype(np.int64)


def sides(
    store: Store, labels: Any, *, are_classes: bool, seed: int = 0
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Addresses of training and held-out rows."""
    parts = split_of(labels_of(store, labels, None, are_classes=are_classes), 0.2, seed).parts
    return np.flatnonzero(parts >= 0), np.flatnonzero(parts == HELD_OUT)


def in_hook_units(model: Any, scaler: StandardScaler) -> tuple[NDArray[Any], NDArray[Any]]:
    weights = np.atleast_2d(model.coef_) / scaler.scale_
    return weights.T, model.intercept_ - weights @ scaler.mean_


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_logistic_is_that_of_scikit_learn(
    store: Store, values: NDArray[np.float32], two: NDArray[np.int64], l2: float
) -> None:
    probe = analysis.fit_probe(store, HOOK, two, l2=l2)[0]
    train, held = sides(store, two, are_classes=True)
    x, y = values.reshape(-1, D).astype(np.float64), two.reshape(-1)
    scaler = StandardScaler().fit(x[train])
    model = LogisticRegression(C=1 / (l2 * len(train)), tol=1e-10, max_iter=10_000)
    model.fit(scaler.transform(x[train]), y[train])
    weights, bias = in_hook_units(model, scaler)
    np.testing.assert_allclose(probe.weights * scaler.scale_[:, None], model.coef_.T, **TIGHT)
    np.testing.assert_allclose(probe.scores(x[held]), x[held] @ weights[:, 0] + bias[0], rtol=1e-4, atol=1e-5)
    theirs = model.predict_proba(scaler.transform(x[held]))
    assert probe.metrics["accuracy"].value == pytest.approx((theirs.argmax(1) == y[held]).mean())
    assert probe.metrics["auc"].value == pytest.approx(roc_auc_score(y[held], theirs[:, 1]))
    assert probe.metrics["log_loss"].value == pytest.approx(log_loss(y[held], theirs), rel=1e-6)
    assert probe.is_converged


def test_multinomial_is_that_of_scikit_learn(
    store: Store, values: NDArray[np.float32], three: NDArray[np.int64]
) -> None:
    probe = analysis.fit_probe(store, HOOK, three, "multinomial", l2=1e-2)[0]
    train, held = sides(store, three, are_classes=True)
    x, y = values.reshape(-1, D).astype(np.float64), three.reshape(-1)
    scaler = StandardScaler().fit(x[train])
    model = LogisticRegression(C=1 / (1e-2 * len(train)), tol=1e-10, max_iter=10_000)
    model.fit(scaler.transform(x[train]), y[train])
    np.testing.assert_allclose(probe.weights * scaler.scale_[:, None], model.coef_.T, **TIGHT)
    theirs = model.predict_proba(scaler.transform(x[held]))
    assert probe.metrics["log_loss"].value == pytest.approx(log_loss(y[held], theirs), rel=1e-6)
    np.testing.assert_array_equal(probe.predict(x[held]), theirs.argmax(1))


@pytest.mark.parametrize("standardise", [True, False])
def test_ridge_is_that_of_scikit_learn(store: Store, values: NDArray[np.float32], standardise: bool) -> None:
    numbers = chances(values)
    numbers[3] = np.nan
    probe = analysis.fit_probe(store, HOOK, numbers, "ridge", l2=0.3, standardise=standardise)[0]
    train, held = sides(store, numbers, are_classes=False)
    x, y = values.reshape(-1, D).astype(np.float64), numbers.reshape(-1)
    scaler = StandardScaler(with_mean=standardise, with_std=standardise).fit(x[train])
    model = Ridge(alpha=0.3 * len(train)).fit(scaler.transform(x[train]), y[train])
    predicted = model.predict(scaler.transform(x[held]))
    np.testing.assert_allclose(probe.scores(x[held]), predicted, rtol=1e-7, atol=1e-7)
    assert probe.metrics["r2"].value == pytest.approx(r2_score(y[held], predicted), rel=1e-6)
    assert probe.metrics["mse"].value == pytest.approx(np.square(y[held] - predicted).mean())
    assert probe.by_l2[0.3] == pytest.approx(probe.metrics["mse"].value)


def test_mean_difference_points_from_one_mean_to_the_other(
    store: Store, values: NDArray[np.float32], two: NDArray[np.int64]
) -> None:
    probe = analysis.fit_probe(store, HOOK, two, "mean_difference")[0]
    train, held = sides(store, two, are_classes=True)
    x, y = values.reshape(-1, D).astype(np.float64), two.reshape(-1)
    first, second = (x[train][y[train] == label].mean(0) for label in (0, 1))
    np.testing.assert_allclose(probe.weights[:, 0], second - first, rtol=1e-9, atol=1e-9)
    expected = (x[held] - (first + second) / 2) @ (second - first) > 0
    assert probe.metrics["accuracy"].value == pytest.approx((expected == y[held]).mean())
    assert probe.l2 is None
    assert "log_loss" not in probe.metrics


def test_penalty_with_the_lowest_held_out_loss_is_taken(
    store: Store, values: NDArray[np.float32], two: NDArray[np.int64]
) -> None:
    penalties = (1e-3, 1e-2, 0.1, 1.0)
    probe = analysis.fit_probe(store, HOOK, two, l2=penalties)[0]
    alone = {l2: analysis.fit_probe(store, HOOK, two, l2=l2)[0].metrics["log_loss"].value for l2 in penalties}
    assert list(probe.by_l2) == list(penalties)
    for l2, loss in alone.items():
        assert probe.by_l2[l2] == pytest.approx(loss, rel=1e-6)
    assert probe.l2 == min(alone, key=lambda l2: alone[l2])
    assert probe.metrics["log_loss"].value == pytest.approx(min(alone.values()))


@pytest.mark.parametrize("kind", ["logistic", "ridge", "mean_difference"])
def test_learning_curve_is_that_of_fewer_documents(
    store: Store, values: NDArray[np.float32], two: NDArray[np.int64], kind: Any
) -> None:
    """Half of the training documents, and the scale of all of them."""
    labels = chances(values) if kind == "ridge" else two
    probe = analysis.fit_probe(store, HOOK, labels, kind, l2=0.01, curve=(0.5,))[0]
    found = labels_of(store, labels, None, are_classes=kind != "ridge")
    split = split_of(found, 0.2, 0, (0.5,))
    assert list(probe.curve) == list(split.n_documents)
    train, some, held = (
        np.flatnonzero(taken) for taken in (split.parts >= 0, split.parts == 0, split.parts == HELD_OUT)
    )
    assert 0.4 * len(train) < len(some) < 0.6 * len(train)
    x, y = values.reshape(-1, D).astype(np.float64), labels.reshape(-1)
    scaler = StandardScaler().fit(x[train])
    if kind == "mean_difference":
        first, second = (x[some][y[some] == label].mean(0) for label in (0, 1))
        right = ((x[held] - (first + second) / 2) @ (second - first) > 0) == y[held]
        expected = right.mean()
    else:
        model = (
            Ridge(alpha=0.01 * len(some))
            if kind == "ridge"
            else LogisticRegression(C=1 / (0.01 * len(some)), tol=1e-10, max_iter=10_000)
        )
        model.fit(scaler.transform(x[some]), y[some])
        expected = model.score(scaler.transform(x[held]), y[held])
    assert probe.curve[split.n_documents[0]] == pytest.approx(expected, rel=1e-6)
    last = probe.metrics["r2" if kind == "ridge" else "accuracy"].value
    assert probe.curve[split.n_documents[-1]] == last


def same(left: Probes, right: Probes) -> None:
    for ours, theirs in zip(left, right, strict=True):
        assert ours.weights.tobytes() == theirs.weights.tobytes()
        assert ours.bias.tobytes() == theirs.bias.tobytes()
        assert (ours.metrics, ours.by_l2, ours.curve) == (theirs.metrics, theirs.by_l2, theirs.curve)


def needed(probes: Probes, kind: Any) -> tuple[int, int]:
    """Bytes for the rows of a hook, and for what it is solved with."""
    n_outputs = len(probes.classes) if kind == "multinomial" else 1
    work = working_nbytes(kind, len(probes[0].by_l2), n_outputs, D, probes.n_rows[0], len(probes[0].curve))
    return held_nbytes(sum(probes.n_rows), D, 4), work


@pytest.mark.parametrize("kind", ["logistic", "multinomial", "ridge", "mean_difference"])
def test_memory_does_not_change_a_bit(store: Store, two: NDArray[np.int64], kind: Any) -> None:
    """All rows held at once, those of one hook after the other, and read again in every pass."""
    options: dict[str, Any] = {"kind": kind, "l2": (0.01, 0.1)}
    labels = np.where(two < 0, np.nan, two) if kind == "ridge" else two
    hooks = [HOOK, OTHER]
    whole = analysis.fit_probe(store, hooks, labels, **options)
    assert whole.n_reads == 1
    rows, work = needed(whole, kind)
    by_hook = analysis.fit_probe(store, hooks, labels, memory=rows + work, **options)
    streamed = analysis.fit_probe(store, hooks, labels, memory=work, **options)
    same(whole, by_hook)
    same(whole, streamed)
    assert by_hook.n_reads == 2
    assert streamed.n_reads > 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_two_bytes(
    tmp_path: Path, values: NDArray[np.float32], two: NDArray[np.int64], dtype: Any
) -> None:
    """They are multiplied as they are stored, held or not."""
    rows = torch.from_numpy(values).to(getattr(torch, dtype))
    stored: Any = rows.numpy() if dtype == "float16" else rows.view(torch.uint16).numpy()
    store = store_of(tmp_path / "store", stored, dtype=dtype)
    labels = np.where(two < 0, np.nan, chances(values))
    whole = analysis.fit_probe(store, HOOK, labels, "ridge", l2=0.3)
    train, held = sides(store, labels, are_classes=False)
    x, y = rows.double().numpy().reshape(-1, D), labels.reshape(-1)
    scaler = StandardScaler().fit(x[train])
    predicted = (
        Ridge(alpha=0.3 * len(train))
        .fit(scaler.transform(x[train]), y[train])
        .predict(scaler.transform(x[held]))
    )
    np.testing.assert_allclose(whole[0].scores(x[held]), predicted, rtol=1e-7, atol=1e-7)
    same(whole, analysis.fit_probe(store, HOOK, labels, "ridge", l2=0.3, memory=needed(whole, "ridge")[1]))


def test_interrupted_fit_goes_on(store: Store, two: NDArray[np.int64], tmp_path: Path) -> None:
    whole = analysis.fit_probe(store, HOOK, two, l2=(0.01, 0.1))
    _, work = needed(whole, "logistic")
    options: dict[str, Any] = {"l2": (0.01, 0.1), "memory": work, "resume": str(tmp_path / "kept")}
    steps = itertools.count()

    def stop(progress: Progress) -> None:
        if next(steps) == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysis.fit_probe(store, HOOK, two, on_progress=stop, **options)
    kept = len(list((tmp_path / "kept").rglob("*.safetensors")))
    assert kept == 61
    told: list[Progress] = []
    again = analysis.fit_probe(store, HOOK, two, on_progress=told.append, **options)
    same(whole, again)
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == kept + len(told)


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_kept_sums_of_another_curve_are_not_taken(
    store: Store, two: NDArray[np.int64], tmp_path: Path, kind: Any
) -> None:
    """No document is beyond the fraction, so that nothing but the number of parts differs."""
    fresh = analysis.fit_probe(store, HOOK, two, kind, l2=(0.01, 0.1), curve=(0.9999,))
    # Without room for rows, every pass is over the store.
    work = working_nbytes(kind, 2, 1, D, fresh.n_rows[0], n_parts=2)
    options: dict[str, Any] = {"l2": (0.01, 0.1), "memory": work, "resume": str(tmp_path / "kept")}
    analysis.fit_probe(store, HOOK, two, kind, curve=(), **options)
    same(fresh, analysis.fit_probe(store, HOOK, two, kind, curve=(0.9999,), **options))


def test_rows_that_are_not_finite_are_left_out_of_all_hooks(
    tmp_path: Path, values: NDArray[np.float32], two: NDArray[np.int64]
) -> None:
    """Whichever hooks are read together."""
    broken = values.copy()
    broken[5, 1, 0], broken[60, 7, 2] = np.nan, np.inf
    labels = two.copy()
    labels[5, 1] = labels[60, 7] = -1
    store = store_of_rows(tmp_path / "store", broken)
    whole = analysis.fit_probe(store, [HOOK, OTHER], two, l2=0.1)
    rows, work = needed(whole, "logistic")
    parts = analysis.fit_probe(store, [HOOK, OTHER], two, l2=0.1, memory=rows + work)
    same(whole, parts)
    same(whole, analysis.fit_probe(store, [HOOK, OTHER], labels, l2=0.1))
    assert whole.n_not_finite == int((two[[5, 60], [1, 7]] >= 0).sum()) > 0
    assert sum(whole.n_rows) == int((labels >= 0).sum())


def test_options_of_scans_choose_rows(
    store: Store, values: NDArray[np.float32], two: NDArray[np.int64]
) -> None:
    """Tokens of the example count upwards."""
    labels = two.copy()
    labels[:, 0] = labels[:3] = -1
    labels[3, 1] = -1
    by_labels = analysis.fit_probe(store, HOOK, labels, l2=0.1)
    by_options = analysis.fit_probe(
        store, HOOK, two, l2=0.1, seqpos=slice(1, None), sequences=slice(3, None), drop=[3 * WIDTH + 1]
    )
    same(by_labels, by_options)


def test_rows_of_either_side_and_rows_without_a_label_are_told(
    store: Store, values: NDArray[np.float32], two: NDArray[np.int64]
) -> None:
    """Scikit-learn gives the same probe on the rows that were fitted."""
    fitted = analysis.fit_probe(store, HOOK, two, l2=0.1, standardise=False)
    assert fitted.n_unlabelled == int((two < 0).sum()) > 0
    assert f"{fitted.n_unlabelled} rows without a label" in str(fitted)
    np.testing.assert_array_equal(fitted.is_training | fitted.is_held_out, two >= 0)
    assert not (fitted.is_training & fitted.is_held_out).any()
    assert (int(fitted.is_training.sum()), int(fitted.is_held_out.sum())) == fitted.n_rows
    chosen = fitted.is_training
    rows = values.astype(np.float64)
    oracle = LogisticRegression(
        solver="newton-cholesky", C=1 / (0.1 * chosen.sum()), tol=1e-10, max_iter=10_000
    )
    oracle.fit(rows[chosen], two[chosen])
    np.testing.assert_allclose(fitted[HOOK].weights[:, 0], oracle.coef_[0], rtol=1e-4, atol=1e-5)


def test_each_hook_has_the_probe_that_it_has_alone(store: Store, two: NDArray[np.int64]) -> None:
    both = analysis.fit_probe(store, "blocks.*.hook_resid_post", two, l2=0.1)
    assert [probe.hook for probe in both] == [HOOK, OTHER]
    for hook in (HOOK, OTHER):
        same(analysis.fit_probe(store, hook, two, l2=0.1), Probes(**vars(both) | {"probes": (both[hook],)}))


def test_baseline_is_the_most_frequent_class_of_training_rows(store: Store, two: NDArray[np.int64]) -> None:
    probes = analysis.fit_probe(store, HOOK, two, l2=0.1)
    train, held = sides(store, two, are_classes=True)
    most = int(two.reshape(-1)[train].mean() > 0.5)
    assert probes.baseline_class == most
    assert probes.baseline == pytest.approx((two.reshape(-1)[held] == most).mean())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "svm"}, "kind is 'svm'; it can be logistic, ridge"),
        ({"l2": 0}, "l2 is 0; give numbers above 0"),
        ({"l2": ()}, "give numbers above 0"),
        ({"l2": np.nan}, "give numbers above 0"),
        ({"held_out": 1.0}, "held_out is 1; give a share"),
        ({"curve": (0.5, 2)}, "give fractions of the training documents"),
        ({"n_bootstrap": -1}, "n_bootstrap is -1"),
        ({"memory": 1000}, "takes .* MB for its sums, and memory is 0 MB"),
        ({"memory": 0}, "memory is 0"),
        ({"labels": "three"}, "choose kind: multinomial"),
        ({"hook": "blocks.1.attn.hook_pattern"}, "does not hold"),
        ({"hook": []}, "no hook is given"),
        ({"drop": list(range(N * WIDTH))}, "no labelled row is left"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_are_not_valid(
    store: Store,
    two: NDArray[np.int64],
    three: NDArray[np.int64],
    changes: dict[str, Any],
    says: str,
) -> None:
    arguments: dict[str, Any] = {"hook": HOOK, "labels": two} | changes
    if isinstance(arguments["labels"], str):
        arguments["labels"] = three
    with pytest.raises((JobError, HookError), match=says):
        analysis.fit_probe(store, **arguments)


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """One cluster for this file. The executor joins it, since this process is connected already."""
    from actstore_workers.cluster import cluster

    with cluster(None, num_cpus=2) as connected:
        yield connected


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_ray_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()  # workers have units of the usual size
    values = values_of(3, 3000)
    store = store_of_rows(tmp_path / "store", values)
    labels = (chances(values) > 0).astype(np.int64)
    on_ray: Any = {"executor": "ray", "num_workers": 2}
    same(
        analysis.fit_probe(store, HOOK, labels, l2=0.01),
        analysis.fit_probe(store, HOOK, labels, l2=0.01, **on_ray),
    )
    # Each scan starts workers, so one scan has all passes of a fit that reads again and again.
    found = labels_of(store, labels, None, are_classes=True)
    targets = Targets(found, split_of(found, 0.2, 0, (0.5,)))
    weights = np.random.default_rng(0).standard_normal((D, 2, 1))
    two = Problem(weights, np.zeros((2, 1)), np.array([0, 1], np.int8))
    one = Problem(weights[:, :1], np.zeros((1, 1)), np.zeros(1, np.int8))
    passes: dict[str, Any] = {
        "sums": ColumnSums((HOOK,), (D,), targets),
        "products": Products((HOOK,), (D,), targets),
        "losses": Losses((HOOK,), targets, (two,)),
        "scores": HeldOutScores((HOOK,), targets, (one,)),
    }
    here, there = scan(store, passes).results, scan(store, passes, **on_ray).results
    for name in passes:
        for ours, theirs in zip(here[name].values(), there[name].values(), strict=True):
            assert ours.tobytes() == theirs.tobytes()
