"""Stores of prompts for probes: rows with two or three classes and a number, and documents that are not sequences."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actstore.facade import Store
from tests.analysis.stores import D, store_of

N, WIDTH = 90, 8


def values_of(seed: int = 0, n: int = N) -> NDArray[np.float32]:
    """Rows whose elements differ in scale, are correlated, and of which one is constant, [n, 8, 16]."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((D, D)) * np.logspace(0, 2, D)
    values = random.standard_normal((n, WIDTH, D)) @ mixed + random.standard_normal(D) * 30
    values[..., 3] = 2.5
    return values.astype(np.float32)


def store_of_rows(folder: Path, values: NDArray[np.float32]) -> Store:
    """A store of these rows, in which each sequence is a document."""
    return store_of(folder, values, dtype="float32")


def chances(values: NDArray[np.float32], seed: int = 1) -> NDArray[np.float64]:
    """A noisy linear function of standardised rows, [n, 8]."""
    random = np.random.default_rng(seed)
    flat = values.reshape(-1, D).astype(np.float64)
    scaled = (flat - flat.mean(0)) / (flat.std(0) + 1e-6)
    noisy: NDArray[np.float64] = scaled @ random.standard_normal(D) + random.standard_normal(len(flat)) * 2
    return noisy.reshape(values.shape[:2])
