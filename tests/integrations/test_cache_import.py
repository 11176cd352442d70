"""Caches of SAELens become stores with the same values and tokens, also after interruptions."""

import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

import actstore
from actstore.cli.main import cli
from actstore.demo import MODEL_PATH
from actstore.errors import (
    ActstoreError,
    HookError,
    JobError,
    ModelError,
    NotCommittedError,
    PlanMismatchError,
    StorageError,
)
from actstore.facade import Store
from actstore.integrations.saelens import data_provider, export_cache, import_cache
from actstore.integrations.saelens.cached_rows import CachedRows
from actstore.integrations.saelens.metadata import metadata
from tests.commands import command
from tests.integrations.conftest import LENGTH, N
from tests.integrations.saes import D_IN, HEADS, RESID, one

MODULE = "transformer.h.2"
"""SAELens' name of `RESID` for models of this class."""


@pytest.fixture(scope="module")
def cached(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    """A cache of several files that SAELens' own runner wrote, and the dataset that it returned."""
    folder = tmp_path_factory.mktemp("cached") / "cache"
    cfg = CacheActivationsRunnerConfig(
        dataset_path="tokens",
        model_name=str(MODEL_PATH),
        model_class_name="AutoModelForCausalLM",
        model_batch_size=16,
        hook_name=MODULE,
        d_in=D_IN,
        training_tokens=N * LENGTH,
        context_size=LENGTH,
        new_cached_activations_path=str(folder),
        shuffle=False,
        device="cpu",
        buffer_size_gb=64 * LENGTH * D_IN * 4 / 1e9,
        prepend_bos=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = Dataset.from_dict({"input_ids": store.tokens[:].tolist()})
        dataset_of_runner = CacheActivationsRunner(cfg, override_dataset=dataset).run()
    assert len(list(folder.glob("*.arrow"))) == 4
    return folder, dataset_of_runner.with_format("numpy")


@pytest.fixture(scope="module")
def exported(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "cache"
    export_cache(store, RESID, folder)
    return folder


@pytest.mark.parametrize("model", [None, str(MODEL_PATH)])
def test_what_saelens_cached(cached: tuple[Path, Dataset], tmp_path: Path, model: str | None) -> None:
    folder, theirs = cached
    imported = import_cache(folder, str(tmp_path / "store"), model=model)
    hook = MODULE if model is None else RESID
    assert imported.hooks == (hook,)
    assert imported.is_complete
    assert imported.n_segments == 2
    rows = theirs[:]
    np.testing.assert_array_equal(
        imported[hook][:].numpy().view(np.uint32), np.asarray(rows[MODULE]).view(np.uint32)
    )
    np.testing.assert_array_equal(imported.tokens[:], rows["token_ids"])
    np.testing.assert_array_equal(imported.documents[:], np.repeat(np.arange(N)[:, None], LENGTH, 1))
    norms = np.linalg.norm(rows[MODULE].astype(np.float64), axis=2)
    assert imported.stats(hook).mean_norm == pytest.approx(norms.mean(), rel=1e-12)
    checked = actstore.verify(imported.url)
    assert checked.is_complete
    assert not checked.findings
    assert imported.plan.request.model.name == (model or "unknown")
    assert imported.metadata["request"]["model"]["fingerprint"].startswith("imported:saelens:")
    with data_provider(imported, hook, batch_size=64, seqpos=[1, 2, 5], max_norm=1e9) as provider:
        assert one(next(provider)).shape == (64, D_IN)
        fields = metadata(provider.loader, hook)
    # Whether there is a BOS token, and which text it was, is not known.
    for name in ("prepend_bos", "sequence_separator_token", "disable_concat_sequences", "dataset_path"):
        assert name not in fields
    assert fields["seqpos_slice"] == [None]  # SAELens has no field for these
    assert fields["actstore_rows"]["positions"] == [1, 2, 5]
    assert fields["actstore_rows"]["max_norm"] == 1e9
    assert fields["actstore_rows"]["n_rows"] == 3 * N


def test_a_cache_that_is_made_again_is_another_one(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(exported, copy)
    before = CachedRows.open(copy).fingerprint
    assert before == CachedRows.open(exported).fingerprint
    rows = CachedRows.open(copy)
    first = rows.values(0, 1).tobytes()
    path = next(file for file in rows.files)
    data = path.read_bytes()
    assert first in data
    path.write_bytes(data.replace(first, bytes(reversed(first))))
    assert CachedRows.open(copy).fingerprint != before


@pytest.mark.parametrize("hook", [RESID, HEADS])
def test_what_we_exported_comes_back(store: Store, tmp_path: Path, hook: str) -> None:
    export_cache(store, hook, tmp_path / "cache")
    imported = import_cache(tmp_path / "cache", str(tmp_path / "store"), model=str(MODEL_PATH))
    assert imported[hook].shape == store[hook].shape
    assert imported[hook].axes == store[hook].axes
    assert torch.equal(imported[hook][:], store[hook][:])
    np.testing.assert_array_equal(imported.tokens[:], store.tokens[:])
    assert imported.stats(hook).mean_norm == pytest.approx(store.stats(hook).mean_norm, rel=1e-12)


def test_another_type(store: Store, exported: Path, tmp_path: Path) -> None:
    imported = import_cache(exported, str(tmp_path / "store"), dtype="bfloat16")
    assert torch.equal(imported[RESID][:], store[RESID][:].bfloat16())
    assert not actstore.verify(imported.url).findings
    with pytest.raises(PlanMismatchError, match="dtype is bfloat16 in the store, float32 was asked for"):
        import_cache(exported, imported.url)
    with pytest.raises(JobError, match="dtype is 'int8'; it can be"):
        import_cache(exported, str(tmp_path / "other"), dtype="int8")  # type: ignore[arg-type]


def test_killed_after_the_first_segment(exported: Path, tmp_path: Path) -> None:
    places = [tmp_path / "whole", tmp_path / "killed"]
    import_cache(exported, str(places[0]))
    script = f"""
import os, signal
from actstore.integrations.saelens import import_cache
import_cache({str(exported)!r}, {str(places[1])!r}, on_bytes=lambda _: os.kill(os.getpid(), signal.SIGKILL))
"""
    done = command(code=script)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = actstore.open(str(places[1]))
    assert (left.n_committed, left.n_segments, left.is_complete) == (1, 2, False)
    assert not actstore.verify(left.url).is_complete
    with pytest.raises(NotCommittedError):
        left[RESID][:]
    assert contents(places[1]) != contents(places[0])
    first = next(places[1].glob("acts/*/c.0.0.0"))
    written = first.stat().st_mtime_ns
    assert import_cache(exported, str(places[1])).is_complete
    assert first.stat().st_mtime_ns == written
    assert contents(places[1]) == contents(places[0])
    assert import_cache(exported, str(places[1])).is_complete  # nothing is left to do


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_runs_a_model_for_it(
    store: Store, exported: Path, fields: dict[str, Any], tmp_path: Path
) -> None:
    imported = import_cache(exported, str(tmp_path / "imported"))
    before = contents(tmp_path / "imported")
    with pytest.raises(
        ModelError, match="were imported, and which weights .* is not known; verify without deep"
    ):
        actstore.verify(imported.url, deep=True, model=str(MODEL_PATH))
    with pytest.raises(PlanMismatchError, match="were imported, and no model's can be put beside them"):
        actstore.plan(**fields | {"out": imported.url})
    with pytest.raises(HookError, match="does not hold 'blocks.0.hook_mlp_out'; it holds"):
        imported["blocks.0.hook_mlp_out"]
    with pytest.raises(HookError, match="imported without saying of which model"):
        imported.matching("blocks.*")
    assert imported["resid_post", 2].hook == RESID
    with pytest.raises(PlanMismatchError, match="is not an import of .* like this one"):
        import_cache(exported, store.url)
    assert contents(tmp_path / "imported") == before


def write(folder: Path, columns: dict[str, Any]) -> Path:
    """Write a folder in SAELens' format with these columns."""
    folder.mkdir()
    table = pa.table(columns)
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


def column(rows: Any, kind: Any = None) -> Any:
    return pa.array(rows, pa.list_(pa.list_(kind or pa.float32())))


ONES = [[[1.0, 2.0]] * 3] * 4
IDS = pa.array([[1, 2, 3]] * 4, pa.list_(pa.int32()))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": column(ONES)}, "has the columns a; it must have one named after a hook, and token_ids"),
        ({"token_ids": IDS}, "has the columns token_ids; it must have one named after a hook"),
        ({"a": column(ONES), "b": column(ONES), "token_ids": IDS}, "has the columns a, b, token_ids"),
        ({"a": column([]), "token_ids": IDS[:0]}, "has no rows"),
        ({"a": IDS, "token_ids": IDS}, "is list<item: int32> in its first row|must be a matrix"),
        ({"a": column([*ONES[:3], ONES[0][:2]]), "token_ids": IDS}, r"shape \[3, 2\] in all of the rows"),
        ({"a": column([*ONES[:3], [[1.0]] * 3]), "token_ids": IDS}, r"shape \[3, 2\] in all of the rows"),
        ({"a": column([*ONES[:3], None]), "token_ids": IDS}, r"shape \[3, 2\] in all of the rows"),
        ({"a": column([*ONES[:3], [[1.0, None]] * 3]), "token_ids": IDS}, "has no value somewhere"),
        (
            {"a": column(ONES), "token_ids": pa.array([[1, 2, 3]] * 3 + [[1]])},
            r"token_ids .* shape \[3\] in all of the rows",
        ),
        ({"a": column(ONES, pa.float64()), "token_ids": IDS}, "is float64; it must be float32 or float16"),
        (
            {"a": column(ONES), "token_ids": pa.array([[1.5] * 3] * 4)},
            "token_ids .* are float64; they must be integers",
        ),
    ],
)
def test_a_folder_that_is_no_cache(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ActstoreError, match=message):
        import_cache(write(tmp_path / "cache", columns), str(tmp_path / "store"))


def test_what_cannot_be_read(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not a folder of cached activations: it has no state.json"):
        import_cache(tmp_path, str(tmp_path / "store"))
    folder = write(tmp_path / "cache", {"a": column(ONES), "token_ids": IDS})
    os.truncate(folder / "data.arrow", 100)
    with pytest.raises(StorageError, match="cannot be read: .*; make it again"):
        import_cache(folder, str(tmp_path / "store"))
    large = write(tmp_path / "large", {"a": column([[[1e6]]] * 4), "token_ids": pa.array([[1]] * 4)})
    with pytest.raises(JobError, match="are too large for float16; choose bfloat16 or float32"):
        import_cache(large, str(tmp_path / "store"), dtype="float16")
    narrow = write(tmp_path / "narrow", {RESID: column(ONES), "token_ids": IDS})
    with pytest.raises(JobError, match="has 128 elements, and rows of the cache have 2"):
        import_cache(narrow, str(tmp_path / "new"), model=str(MODEL_PATH))
    odd = write(tmp_path / "odd", {"../a": column(ONES), "token_ids": IDS})
    with pytest.raises(HookError, match="has a name that no store can have; name the model"):
        import_cache(odd, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_import_on_the_command_line(exported: Path, tmp_path: Path) -> None:
    args = ["import", "--from", "saelens", str(exported), "-o", str(tmp_path / "store"), "--dtype", "float16"]
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout == (f"256 sequences of {RESID} in {tmp_path / 'store'}; context_size=32, d_in=128\n")
    for shown in (["verify"], ["info"], ["stats"]):
        done = CliRunner().invoke(cli, [*shown, str(tmp_path / "store")], catch_exceptions=False)
        assert done.exit_code == 0, done.output
