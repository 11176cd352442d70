"""Geometry on Ray: workers that read two stores give the bits of this process."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from actstore import analysis
from tests.analysis.stores import HOOK, D, store_of
from tests.store.example import HOOKS


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
    store = store_of(tmp_path / "first", values)
    other = store_of(tmp_path / "other", values + random.standard_normal(values.shape).astype(np.float32))
    on_ray: dict[str, Any] = {"executor": "ray", "num_workers": 2}
    options: dict[str, Any] = {"other_store": other, "debiased": True}
    inline = analysis.cka(store, list(HOOKS[:2]), HOOK, **options)
    assert (
        inline.values.tobytes()
        == analysis.cka(store, list(HOOKS[:2]), HOOK, **options, **on_ray).values.tobytes()
    )
    first, second = slice(2500), slice(2500, None)
    here = analysis.mean_difference(store, HOOK, first, second)
    there = analysis.mean_difference(store, HOOK, first, second, **on_ray)
    assert here.standard_error.tobytes() == there.standard_error.tobytes()
    assert here.vector.numpy().tobytes() == there.vector.numpy().tobytes()
