"""Figures of SAEs against SAELens' own on the same rows, and against NumPy; the same bits however rows are divided."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actstore import analysis
from actstore.analysis.sae_evaluation import sums
from actstore.analysis.sae_evaluation.figures import SaeFigures
from actstore.analysis.sae_evaluation.held_out import ByDocument
from actstore.analysis.sae_evaluation.saes import saes_of
from actstore.analysis.sae_evaluation.sums import Evaluation
from actstore.analysis.scanning import unit as unit_module
from actstore.errors import JobError
from actstore.facade import Store
from tests.analysis.sae_evaluation.plain import PlainSae
from tests.analysis.sae_evaluation.saes import figures_of_sae_lens, sae_of
from tests.analysis.sae_evaluation.stores import store_of_documents
from tests.analysis.stores import HOOK, D, store_of

Values = NDArray[np.float32]
SAELENS = {
    "explained_variance": "explained_variance",
    "explained_variance_legacy": "explained_variance_legacy",
    "mse": "mse",
    "relative_reconstruction_bias": "relative_reconstruction_bias",
    "cosine_similarity": "cossim",
    "norm_ratio": "l2_ratio",
    "l0": "l0",
    "l1": "l1",
}


@pytest.fixture(scope="module")
def values() -> Values:
    random = np.random.default_rng(0)
    spread = random.gamma(1.0, 1.0, D) + 0.1
    return np.asarray(random.standard_normal((150, 8, D)) * spread + 2, np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, values: Values) -> Store:
    return store_of_documents(tmp_path_factory.mktemp("store"), values, documents_of(150))


def documents_of(n_sequences: int) -> NDArray[np.int64]:
    """Documents of 1 to 40 tokens, which begin anywhere."""
    lengths = np.random.default_rng(8).integers(1, 41, n_sequences * 8)
    return np.repeat(np.arange(len(lengths)), lengths)[: n_sequences * 8].reshape(n_sequences, 8)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units of a few blocks each, and few rows that are encoded together."""
    monkeypatch.setattr(unit_module, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(unit_module, "_UNIT_ROWS", 96)
    monkeypatch.setattr(sums, "_FEATURES_AT_ONCE", 40 * 13)


def plain_figures(sae: PlainSae, blocks: list[Values]) -> dict[str, Any]:
    """Figures in float64, from all rows at once but for the legacy one."""
    rows = np.concatenate(blocks).astype(np.float64)
    encoder, bias, decoder = (weight.detach().double().numpy() for weight in sae.parameters())
    features = np.maximum(rows @ encoder + bias, 0)
    rebuilt = features @ decoder
    errors = ((rows - rebuilt) ** 2).sum(1)
    means = np.concatenate([np.broadcast_to(b.mean(0, dtype=np.float64), b.shape) for b in blocks])
    distances = ((rows - means) ** 2).sum(1)
    norms, rebuilt_norms = np.linalg.norm(rows, axis=1), np.linalg.norm(rebuilt, axis=1)
    products = (rows * rebuilt).sum(1)
    apart = distances > 0
    return {
        "explained_variance": 1 - errors.sum() / ((rows - rows.mean(0)) ** 2).sum(),
        "explained_variance_legacy": (1 - errors[apart] / distances[apart]).mean() if apart.any() else np.nan,
        "mse": errors.mean(),
        "relative_reconstruction_bias": (rebuilt_norms**2).mean() / products.mean(),
        "cosine_similarity": (products / norms / rebuilt_norms).mean(),
        "norm_ratio": (rebuilt_norms / norms).mean(),
        "l0": (features > 0).sum(1).mean(),
        "l1": features.sum(1).mean(),
        "density": (features > 0).mean(0),
    }


def assert_same(figures: SaeFigures, expected: dict[str, Any], rel: float = 1e-4) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(figures, name), value, rtol=rel, atol=rel / 10, err_msg=name)


def bits(figures: SaeFigures) -> list[Any]:
    """All figures, in a form that is equal for equal bits only."""
    found = [getattr(figures, one.name) for one in fields(figures)]
    return [one.tobytes() if isinstance(one, np.ndarray) else repr(one) for one in found]


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "layer_norm", "not centred"])
def test_figures_are_those_of_sae_lens(kind: str, store: Store, values: Values) -> None:
    changed: dict[str, dict[str, Any]] = {
        "layer_norm": {"normalize_activations": "layer_norm"},
        "not centred": {"apply_b_dec_to_input": False},
    }
    options = changed.get(kind, {})
    sae = sae_of("standard" if options else kind, D, 40, **options)
    theirs, density = figures_of_sae_lens(sae, values.reshape(-1, D))
    ours = analysis.evaluate_sae(store, HOOK, sae)
    assert_same(ours[0], {name: theirs[theirs_name] for name, theirs_name in SAELENS.items()})
    np.testing.assert_allclose(ours[0].density, density, rtol=1e-6)
    assert ours[0].dead_features.tolist() == [i for i, one in enumerate(density) if one == 0]
    assert len(ours[0].dead_features) >= 3
    assert ours[0].dense_features.tolist() == [i for i, one in enumerate(density) if one > 0.1]
    assert (ours.n_rows, ours.n_not_finite) == (1200, 0)


def test_batches_of_sae_lens_are_our_blocks(
    store: Store, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their legacy figure depends on the rows of a batch: with batches of a block each, it is ours."""
    monkeypatch.setattr(unit_module, "_BLOCK_ROWS", 400)
    sae = sae_of("topk", D, 40)
    blocks = values.reshape(3, 400, D)
    legacy = [figures_of_sae_lens(sae, block)[0]["explained_variance_legacy"] for block in blocks]
    ours = analysis.evaluate_sae(store, HOOK, sae)[0]
    assert ours.explained_variance_legacy == pytest.approx(np.mean(legacy), rel=1e-5)
    whole = figures_of_sae_lens(sae, values.reshape(-1, D))[0]["explained_variance_legacy"]
    assert ours.explained_variance_legacy != pytest.approx(whole, rel=1e-5)


@pytest.mark.usefixtures("small_units")
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_figures_are_those_of_numpy(data: st.DataObject, store: Store, values: Values) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    held_out = random.random((150, 8)) < data.draw(st.sampled_from([0.05, 0.5, 1.0]))
    held_out[random.integers(150), 4] = True
    seqpos = data.draw(st.sampled_from([None, slice(1, None), [0, 4]]))
    taken = np.zeros((150, 8), bool)
    taken[:, slice(None) if seqpos is None else seqpos] = True
    taken &= held_out
    saes = {"narrow": PlainSae(D, 13), "wide": PlainSae(D, 70, seed=1)}
    evaluation = analysis.evaluate_sae(store, HOOK, saes, held_out=held_out, seqpos=seqpos)
    # Blocks have 32 rows: 4 sequences.
    blocks = [values[i : i + 4][taken[i : i + 4]] for i in range(0, 150, 4)]
    for name, sae in saes.items():
        assert_same(evaluation[name], plain_figures(sae, [block for block in blocks if len(block)]), 3e-4)
    assert evaluation.n_rows == taken.sum()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_of_half_precision(dtype: str, tmp_path: Path, values: Values) -> None:
    store = store_of_documents(tmp_path, values, documents_of(150), dtype)
    rounded = store[HOOK][:].float().numpy()
    assert not np.array_equal(rounded, values)
    sae = PlainSae(D, 30)
    assert_same(analysis.evaluate_sae(store, HOOK, sae)[0], plain_figures(sae, [rounded.reshape(-1, D)]))


def test_rows_that_are_not_finite_are_left_out(tmp_path: Path, values: Values) -> None:
    spoilt = values.copy()
    spoilt[7, 3, 2], spoilt[9, 0, 0] = np.nan, np.inf
    is_finite = np.isfinite(spoilt).all(-1)
    sae = PlainSae(D, 30)
    evaluation = analysis.evaluate_sae(store_of(tmp_path, spoilt), HOOK, sae)
    assert_same(evaluation[0], plain_figures(sae, [spoilt[is_finite]]))
    assert (evaluation.n_rows, evaluation.n_not_finite) == (1198, 2)


@pytest.mark.usefixtures("small_units")
def test_rows_that_are_all_equal(tmp_path: Path) -> None:
    """There is no variance to explain, and nothing to divide by."""
    store = store_of(tmp_path, np.ones((20, 8, D), np.float32))
    figures = analysis.evaluate_sae(store, HOOK, PlainSae(D, 30))[0]
    assert np.isnan(figures.explained_variance)
    assert np.isnan(figures.explained_variance_legacy)
    assert figures.mse > 0


def three_saes() -> list[Any]:
    return [sae_of("topk", D, 40), sae_of("standard", D, 24), PlainSae(D, 70)]


@pytest.mark.usefixtures("small_units")
def test_interrupted_evaluation_goes_on_in_the_same_bits(store: Store, tmp_path: Path) -> None:
    folder, saes = str(tmp_path / "kept"), three_saes()
    whole = analysis.evaluate_sae(store, HOOK, saes, held_out=0.5)

    def stop(progress: Any) -> None:
        if progress.n_sequences >= 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysis.evaluate_sae(store, HOOK, saes, held_out=0.5, resume=folder, on_progress=stop)
    kept = len(list(Path(folder).rglob("*.safetensors")))
    told: list[Any] = []
    again = analysis.evaluate_sae(store, HOOK, saes, held_out=0.5, resume=folder, on_progress=told.append)
    assert kept > 0
    assert len(told) == 13 - kept
    assert [bits(one) for one in whole] == [bits(one) for one in again]


@pytest.mark.usefixtures("small_units")
def test_what_is_kept_is_not_that_of_others(store: Store, tmp_path: Path) -> None:
    folder = str(tmp_path / "kept")
    analysis.evaluate_sae(store, HOOK, PlainSae(D, 40), held_out=0.5, resume=folder)
    for sae, options in (
        (PlainSae(D, 40, seed=1), {"held_out": 0.5}),
        (PlainSae(D, 40), {"held_out": 0.6}),
        (PlainSae(D, 40), {"held_out": 0.5, "seed": 1}),
        (PlainSae(D, 40), {"held_out": np.arange(150) < 70}),
        (PlainSae(D, 40), {}),
    ):
        shared = analysis.evaluate_sae(store, HOOK, sae, resume=folder, **options)
        assert bits(shared[0]) == bits(analysis.evaluate_sae(store, HOOK, sae, **options)[0])


@pytest.mark.usefixtures("small_units")
def test_order_of_units_does_not_matter(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    saes = three_saes()
    whole = analysis.evaluate_sae(store, HOOK, saes)

    def backwards(spec: Any, pending: Any, _resources: Any, on_done: Callable[[Any], None]) -> None:
        worker = spec.start()
        for index in reversed(pending):
            on_done(worker.run(index))
        worker.close()

    monkeypatch.setattr("actstore.analysis.scanning.scan.find_executor", lambda _name: backwards)
    again = analysis.evaluate_sae(store, HOOK, saes)
    assert [bits(one) for one in whole] == [bits(one) for one in again]


def test_saes_do_not_change_each_other(store: Store) -> None:
    saes = three_saes()
    together = analysis.evaluate_sae(store, HOOK, saes)
    for sae, figures in zip(saes, together, strict=True):
        alone = analysis.evaluate_sae(store, HOOK, {figures.name: sae})[0]
        assert bits(alone) == bits(figures)


@pytest.mark.usefixtures("small_units")
def test_sae_that_keeps_a_state_is_used_by_one_thread_at_a_time(tmp_path: Path) -> None:
    """With ``layer_norm``, SAELens keeps the norms of one call in the object until the next."""
    values = np.random.default_rng(3).standard_normal((1000, 8, D)).astype(np.float32)
    sae = sae_of("standard", D, 40, normalize_activations="layer_norm")
    theirs, _ = figures_of_sae_lens(sae, values.reshape(-1, D))
    ours = analysis.evaluate_sae(store_of(tmp_path, values), HOOK, sae)[0]
    assert ours.mse == pytest.approx(theirs["mse"], rel=1e-5)


def test_held_out_documents_are_whole(store: Store, values: Values) -> None:
    documents = np.asarray(store.documents[:])
    rows = analysis.held_out_rows(store, 0.3, seed=5)
    chosen = set(documents[rows].tolist())
    assert chosen.isdisjoint(documents[~rows].tolist())
    assert 0.1 < len(chosen) / len(set(documents.ravel().tolist())) < 0.5
    np.testing.assert_array_equal(rows, analysis.held_out_rows(store, 0.3, seed=5))
    assert not np.array_equal(rows, analysis.held_out_rows(store, 0.3, seed=6))
    sae = PlainSae(D, 30)
    by_mask = analysis.evaluate_sae(store, HOOK, sae, held_out=rows)
    by_fraction = analysis.evaluate_sae(store, HOOK, sae, held_out=0.3, seed=5)
    assert bits(by_mask[0]) == bits(by_fraction[0])
    assert by_mask.n_rows == rows.sum()
    assert_same(by_mask[0], plain_figures(sae, [values[rows]]))


def test_what_packing_put_in_is_never_held_out(tmp_path: Path, values: Values) -> None:
    documents = documents_of(150)
    documents[:, 0] = -1
    store = store_of_documents(tmp_path, values, documents)
    np.testing.assert_array_equal(analysis.held_out_rows(store, 1.0), documents >= 0)


def test_documents_are_drawn_evenly_and_by_their_number_alone() -> None:
    numbers = np.arange(100_000)
    for seed in (0, 1, 2**63):
        drawn = ByDocument(0.3, seed).of(numbers)
        assert abs(drawn.mean() - 0.3) < 0.01
        # Neighbours are drawn independently, and smaller fractions are part of larger ones.
        assert abs((drawn[1:] & drawn[:-1]).mean() - 0.09) < 0.01
        assert not (ByDocument(0.1, seed).of(numbers) & ~drawn).any()
        np.testing.assert_array_equal(ByDocument(0.3, seed).of(numbers[500:600]), drawn[500:600])
    other = ByDocument(0.3, 3).of(numbers)
    assert abs((other & ByDocument(0.3, 0).of(numbers)).mean() - 0.09) < 0.01


@pytest.mark.parametrize(
    ("saes", "options", "says"),
    [
        (PlainSae(D + 1, 30), {}, r"sae does not take rows of shape \[16\]"),
        (lambda: 3, {}, "give an SAE, which has encode and decode"),
        ([], {}, "no SAE was given"),
        (PlainSae(D, 30), {"held_out": 0.0}, "must be above 0, and 1 at most"),
        (
            PlainSae(D, 30),
            {"held_out": np.ones(149, bool)},
            r"give a fraction of the documents, or bool \[150\]",
        ),
        (PlainSae(D, 30), {"held_out": np.zeros((150, 8), bool)}, "False everywhere"),
        (PlainSae(D, 30), {"held_out": np.arange(150) == 3, "sequences": [4]}, "no held-out row"),
        (
            sae_of("standard", D, 30, normalize_activations="expected_average_only_in"),
            {},
            "does not have its numbers",
        ),
    ],
    ids=["width", "function", "none", "fraction", "shape", "nothing held out", "nothing left", "not folded"],
)
def test_what_does_not_fit_is_refused(saes: Any, options: dict[str, Any], says: str, store: Store) -> None:
    with pytest.raises(JobError, match=says):
        analysis.evaluate_sae(store, HOOK, saes, **options)


def test_objects_that_cannot_be_told_from_others_do_not_go_on(store: Store, tmp_path: Path) -> None:
    class Bare:
        """Nothing but two methods."""

        def encode(self, rows: torch.Tensor) -> torch.Tensor:
            return rows.clamp(min=0)

        def decode(self, features: torch.Tensor) -> torch.Tensor:
            return features

    assert analysis.evaluate_sae(store, HOOK, Bare())[0].explained_variance < 1
    with pytest.raises(JobError, match="leave resume out"):
        analysis.evaluate_sae(store, HOOK, Bare(), resume=str(tmp_path))


@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_saes_of_sae_lens_travel_to_workers(normalisation: str, store: Store) -> None:
    from ray import cloudpickle

    sae = sae_of("standard", D, 24, normalize_activations=normalisation)
    sent = cloudpickle.loads(cloudpickle.dumps(Evaluation(HOOK, saes_of(sae, (D,)), ByDocument(0.4))))
    here = analysis.evaluate_sae(store, HOOK, sae)
    assert bits(analysis.evaluate_sae(store, HOOK, sent.saes[0].sae)[0]) == bits(here[0])
    assert sent.identity() == Evaluation(HOOK, saes_of(sae, (D,)), ByDocument(0.4)).identity()


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """One cluster for this file. The executor joins it, since this process is connected already."""
    from actstore_workers.cluster import cluster

    with cluster(None, num_cpus=2) as connected:
        yield connected


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_ray_gives_the_same_bits(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    values = random.standard_normal((5000, 8, D)).astype(np.float32)
    store = store_of_documents(tmp_path, values, documents_of(5000))
    saes = [PlainSae(D, 40), PlainSae(D, 24, seed=1)]
    inline = analysis.evaluate_sae(store, HOOK, saes, held_out=0.4)
    again = analysis.evaluate_sae(store, HOOK, saes, held_out=0.4, executor="ray", num_workers=2)
    assert [bits(one) for one in inline] == [bits(one) for one in again]
