"""Logistic probes of all layers of a store, compared with scikit-learn on one layer after the other."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

import actstore
from actstore import analysis
from actstore.analysis.probes.rows.labels import labels_of
from actstore.analysis.probes.rows.splits import HELD_OUT, split_of
from actstore.storage.local import LocalBlobs
from actstore.store.format.plan import HookArray
from actstore.store.records.seal import seal
from tests.benchmarks.measure import Against, Figure, Result, Speed, interleaved, timed
from tests.store.example import LENGTH, example_plan, write_store

N_LAYERS: Final = 30
D_MODEL: Final = 576
"""As SmolLM2-135M has."""
N_ROWS: Final = 10_000
PENALTIES: Final = (1e-3, 1e-2, 1e-1)
_OURS: Final[Mapping[str, Any]] = {"l2": PENALTIES, "curve": (), "n_bootstrap": 200}
_THEIR_LAYERS: Final = (7, 22)
"""Layers that scikit-learn fits in a turn; each takes about as long."""
_MANY_ROWS: Final = 100_000
_MANY_LAYERS: Final = 8
_MEMORY: Final = 512 << 20


def hook_of(layer: int) -> str:
    """Name of the hook of a layer."""
    return f"blocks.{layer}.hook_resid_post"


def store_at(folder: Path, n_rows: int, n_layers: int) -> NDArray[np.int64]:
    """Write a store of rows as correlated and as unequal in scale as those of models; returns labels by token."""
    n_sequences = n_rows // LENGTH
    plan = example_plan("bfloat16", n_sequences=n_sequences, n_tokens=n_rows, segment_size=n_sequences)
    hooks = tuple(HookArray(name=hook_of(i), shape=(D_MODEL,), axes=("d_model",)) for i in range(n_layers))
    model = plan.request.model
    config = dict(model.config) | {"n_embd": D_MODEL, "n_layer": n_layers}
    model = model.model_copy(update={"config": config, "n_layers": n_layers})
    plan = plan.model_copy(
        update={"request": plan.request.model_copy(update={"hooks": hooks, "model": model})}
    )
    random = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, D_MODEL + 1) ** -0.7
    hidden = torch.randn(n_rows, D_MODEL, generator=random) * spectrum
    columns = {}
    for layer in range(n_layers):
        mixed = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=random))[0] * 10
        noise = torch.randn(n_rows, D_MODEL, generator=random) * 0.05
        rows = hidden @ mixed + torch.randn(D_MODEL, generator=random) * 5 + noise
        columns[hook_of(layer)] = rows.bfloat16().view(torch.uint16).numpy().reshape(-1, LENGTH, D_MODEL)
    blobs = LocalBlobs(folder)
    write_store(blobs, plan, columns, range(plan.n_segments))
    seal(blobs)
    scores = (hidden / spectrum) @ torch.randn(D_MODEL, generator=random) / D_MODEL**0.5
    chances = torch.sigmoid(3 * scores)
    labels: NDArray[np.int64] = torch.bernoulli(chances, generator=random).long().numpy().reshape(-1, LENGTH)
    return labels


def run(folder: Path) -> list[Result]:
    """Measure both sides in turns, then the memory of many rows."""
    labels = store_at(folder / "probes", N_ROWS, N_LAYERS)
    url = str(folder / "probes")

    def ours() -> float:
        probes = analysis.fit_probe(actstore.open(url), "blocks.*.hook_resid_post", labels, **_OURS)
        assert all(probe.is_converged for probe in probes)
        return len(probes)

    sides = {"ours": timed(ours), "theirs": timed(_theirs(url, labels))}
    rates = interleaved(sides, turns=3)
    name = (
        f"logistic probes of {N_LAYERS} layers x {N_ROWS:,} rows of {D_MODEL}, {len(PENALTIES)} penalties each, "
        "from the store to the held-out metrics"
    )
    theirs = Against("scikit-learn, one layer after the other (2 of them)", rates["theirs"], 5)
    return [Speed(name, "probes/s", rates["ours"], (theirs,)), _memory_of_many_rows(folder)]


def _theirs(url: str, labels: NDArray[np.int64]) -> Callable[[], float]:
    """LogisticRegression with its own tolerance; the same rows, split and penalties, and the same metrics."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss, roc_auc_score
    from sklearn.preprocessing import StandardScaler

    parts = split_of(labels_of(actstore.open(url), labels, None, are_classes=True), 0.2, 0).parts
    train, held = np.flatnonzero(parts >= 0), np.flatnonzero(parts == HELD_OUT)
    y = labels.reshape(-1)

    def fit() -> float:
        store = actstore.open(url)
        for layer in _THEIR_LAYERS:
            rows = store[hook_of(layer)][:].flatten(0, 1).double().numpy()
            scaler = StandardScaler().fit(rows[train])
            trained, measured = scaler.transform(rows[train]), scaler.transform(rows[held])
            best = []
            for l2 in PENALTIES:
                model = LogisticRegression(C=1 / (l2 * len(train)), max_iter=10_000).fit(trained, y[train])
                chances = model.predict_proba(measured)[:, 1]
                best.append((log_loss(y[held], chances), roc_auc_score(y[held], chances)))
            min(best)
        return len(_THEIR_LAYERS)

    return fit


def _memory_of_many_rows(folder: Path) -> Figure:
    labels = store_at(folder / "many", _MANY_ROWS, _MANY_LAYERS)
    np.save(folder / "many.npy", labels)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        peak = process.submit(_peak_mb, str(folder / "many"), str(folder / "many.npy")).result()
    stored = _MANY_ROWS * D_MODEL * 2 * _MANY_LAYERS / 1e6
    return Figure(
        f"logistic probes of {_MANY_LAYERS} layers x {_MANY_ROWS:,} rows, {stored:,.0f} MB: memory above the start, "
        f"with memory={_MEMORY / 1e6:,.0f} MB",
        peak,
        "MB",
        1.25 * _MEMORY / 1e6,
    )


def _peak_mb(url: str, labels: str) -> float:
    import threading

    store, by_token = actstore.open(url), np.load(labels)
    analysis.fit_probe(
        store, hook_of(0), by_token[:, :], "mean_difference", curve=()
    )  # what is imported for it
    before = peak = _anonymous_mb()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, _anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        analysis.fit_probe(store, "blocks.*.hook_resid_post", by_token, memory=_MEMORY, **_OURS)
    finally:
        done.set()
        watcher.join()
    return peak - before


def _anonymous_mb() -> float:
    status = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6
