"""Files that are damaged before or while a loader reads them."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from actstore.errors import StorageError, StoreReplacedError
from actstore.facade import Store
from actstore.loader.rows.address_range import AddressRange
from actstore.storage.local import LocalBlobs
from tests.loader.stores import N_ROWS, A, check, finished
from tests.store.example import example_plan


def cut(path: Path) -> None:
    os.truncate(path, 4096)


def test_a_file_that_becomes_shorter_is_an_error(store: Store) -> None:
    loader = store.loader(A, batch_size=N_ROWS, epochs=None, prefetch=0)
    next(loader)
    cut(Path(store.url) / f"acts/{A}/c.1.0.0")
    with pytest.raises(
        StorageError, match=r"c\.1\.0\.0 has become shorter while it was read; .* `actstore verify"
    ):
        next(loader)
    # The error repeats: what became zeros must never be taken for values.
    with pytest.raises(StorageError, match="has become shorter"):
        next(loader)


def test_a_store_that_another_is_written_over_is_not_called_damaged(store: Store, tmp_path: Path) -> None:
    other, _ = finished(LocalBlobs(tmp_path / "other"), example_plan(n_documents=1))
    loader = store.loader(A, batch_size=N_ROWS, epochs=None, prefetch=0)
    next(loader)
    shutil.copytree(other.url, store.url, dirs_exist_ok=True)
    cut(Path(store.url) / f"acts/{A}/c.1.0.0")
    with pytest.raises(StoreReplacedError, match="open it again"):
        next(loader)


def test_a_file_that_was_shorter_is_an_error(store: Store) -> None:
    cut(Path(store.url) / f"acts/{A}/c.1.0.0")
    with pytest.raises(StorageError, match="is damaged"):
        next(store.loader(A, batch_size=8))


def test_a_file_that_is_gone_is_an_error(store: Store) -> None:
    (Path(store.url) / f"acts/{A}/c.1.0.0").unlink()
    with pytest.raises(StorageError, match="cannot be opened: No such file"):
        next(store.loader(A, batch_size=8))


@pytest.mark.parametrize("shuffle", ["global", "window"])
def test_after_an_error_the_same_batch_comes_again(
    tmp_path: Path, shuffle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shuffle == "window":
        monkeypatch.setattr(AddressRange, "fits", staticmethod(lambda _: False))
    store, values = finished(LocalBlobs(tmp_path / "store"), example_plan())
    path = Path(store.url) / f"acts/{A}/c.1.0.0"
    hidden = path.rename(tmp_path / "hidden")
    loader = store.loader(A, batch_size=8, shuffle=shuffle)
    for _ in range(2):
        with pytest.raises(StorageError, match="cannot be opened|is committed but missing"):
            next(loader)
    hidden.rename(path)
    check(loader, A, values[A])
