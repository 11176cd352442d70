"""Small stores on a local disk."""

from pathlib import Path

import pytest

from actstore.facade import Store
from actstore.storage.local import LocalBlobs
from tests.loader.stores import finished
from tests.store.example import Columns, example_plan


@pytest.fixture(params=["float32", "bfloat16"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Columns]:
    return finished(LocalBlobs(tmp_path / "store"), example_plan(request.param))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return finished(LocalBlobs(tmp_path / "store"), example_plan())[0]
