"""Whether a server reports that it can answer."""

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

from actstore.query.problem import Problem
from actstore.query.server import readiness
from actstore.query.server.catalog import catalog as catalog_module
from actstore.query.server.catalog.catalog import Catalog
from actstore.query.server.readiness import Readiness
from actstore.storage.local import LocalBlobs
from tests.store.example import example_plan, example_values, write_store


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """A catalog of one store, ``store``, that was used a moment ago."""
    plan = example_plan()
    write_store(LocalBlobs(tmp_path / "store"), plan, example_values(plan), range(plan.n_segments))
    catalog = Catalog({"store": str(tmp_path / "store")}, None)
    catalog.store("store")
    asyncio.run(Readiness(catalog, None).check())
    return catalog


def test_storage_that_hangs_for_somebody_else(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow look at the store does not hold up requests, but the readiness check must report it."""
    monkeypatch.setattr(readiness, "_PATIENCE_S", 0.5)
    (opened,) = catalog._opened.values()
    looks, is_over = threading.Event(), threading.Event()

    def look() -> None:
        with opened._lock:
            looks.set()
            is_over.wait(60)

    other = threading.Thread(target=look)
    other.start()
    assert looks.wait(60)
    ready = Readiness(catalog, None)
    try:
        assert catalog.store("store") is opened.store()
        with pytest.raises(Problem, match="did not answer within"):
            asyncio.run(ready.check())
    finally:
        is_over.set()
        other.join()
    monkeypatch.setattr(readiness, "_PATIENCE_S", 60.0)
    asyncio.run(ready.check())


def test_a_store_that_was_there_a_moment_ago(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "_LOOK_S", 3600.0)
    shutil.rmtree(tmp_path / "store")
    assert catalog.cached("store") is not None
    with pytest.raises(Problem, match="cannot be read now"):
        asyncio.run(Readiness(catalog, None).check())


def test_storage_is_not_asked_without_pause(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_KEPT_S", 3600.0)
    ready = Readiness(catalog, None)
    asyncio.run(ready.check())
    (opened,) = catalog._opened.values()
    looked_at = opened._looked_at
    for _ in range(3):
        asyncio.run(ready.check())
    assert opened._looked_at == looked_at
