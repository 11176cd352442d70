"""Stores made to do harm: each is refused in one sentence, nothing outside is read, and little memory is taken."""

import json
import os
import re
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import actstore
from actstore.cli.main import cli
from actstore.errors import ActstoreError, StorageError
from actstore.hooks.families.stored_config import hooks_of_stored
from actstore.storage.local import LocalBlobs
from actstore.store.format.layout import to_json
from actstore.store.format.shard import crc32c
from actstore.store.records.commit import commit_key, plan_key, tokens_key
from actstore.store.records.manifest import MANIFEST_KEY, shards_key
from actstore.store.records.shards_table import SHARDS_SCHEMA
from tests.store.arrays import bits
from tests.store.example import HOOKS, LENGTH, N, example_plan
from tests.store.verifying.test_verify import SHARD, found_in, make_store, numbers, overwrite, point_to

RUN = "0000"
RESID_0 = HOOKS[0]
PLAN_KEY = plan_key(RUN)
_SOURCES = [Path(actstore.__file__).parent, Path(actstore.__file__).parents[1] / "workers"]
_opened: list[str] | None = None
_unpickled: list[str] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        _unpickled.append(f"{args[0]}.{args[1]}")
    if (
        _opened is not None
        and event in ("open", "os.listdir", "os.scandir")
        and isinstance(args[0], str | bytes)
    ):
        _opened.append(os.fsdecode(args[0]))


sys.addaudithook(_watch)


@contextmanager
def nothing_outside(root: Path) -> Iterator[None]:
    """Check that only files below a folder, and those of Python itself, are opened."""
    global _opened
    _opened = []
    n_unpickled = len(_unpickled)
    try:
        yield
    finally:
        opened, _opened = _opened, None
    known = (str(root), sys.prefix, sys.base_prefix, str(_SOURCES[0]), "/proc/", "/sys/", os.devnull)
    outside = [path for path in opened if not os.path.abspath(path).startswith(known)]  # noqa: PTH100
    assert outside == []
    assert _unpickled[n_unpickled:] == []


@contextmanager
def small_and_quick() -> Iterator[None]:
    started = time.monotonic()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200e6
    assert time.monotonic() - started < 20


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Import what takes time and opens files, before anything is measured."""
    for config in ({"model_type": "gpt2"}, CONFIGS["sizes of another type"]):
        with suppress(ActstoreError):
            hooks_of_stored(config)


@pytest.fixture
def store(tmp_path: Path) -> LocalBlobs:
    """An intact store, beside a file that nobody may read."""
    (tmp_path / "secret").write_text("secret")
    blobs = LocalBlobs(tmp_path / "store")
    make_store(blobs)
    return blobs


def signed(fields: dict[str, Any]) -> bytes:
    """A document with a valid checksum."""
    return signed_body(to_json(fields).removeprefix(b"{\n"))


def signed_body(body: bytes) -> bytes:
    return b'{\n  "checksum": %d,\n' % crc32c(body) + body


def edit(blobs: LocalBlobs, key: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a document, and make its checksum valid again."""
    fields = json.loads(bytes(blobs.read(key)))
    del fields["checksum"]
    change(fields)
    overwrite(blobs, key, signed(fields))


def put(fields: Any, place: str, value: Any) -> None:
    *path, last = place.split(".")
    for name in path:
        fields = fields[int(name)] if name.isdigit() else fields[name]
    fields[int(last) if last.isdigit() else last] = value


def edit_plan(blobs: LocalBlobs, changes: dict[str, Any], *, sealed: bool) -> None:
    """Change a plan in its own file and, if it is in the manifest, there."""

    def change(plan: dict[str, Any]) -> None:
        for place, value in changes.items():
            put(plan, place, value)

    edit(blobs, PLAN_KEY, change)
    if sealed:
        edit(blobs, MANIFEST_KEY, lambda fields: change(fields["runs"][0]["plan"]))
    else:
        blobs.delete(MANIFEST_KEY)


def check_refused(blobs: LocalBlobs) -> None:
    """Check that a store is neither opened nor taken for whole, in one sentence each."""
    with nothing_outside(blobs.root), small_and_quick():
        with pytest.raises(StorageError) as caught:
            actstore.open(blobs.url)
        assert_sentence(str(caught.value))
        verification = actstore.verify(blobs.url)
    assert verification.damage
    for finding in verification.findings:
        assert_sentence(str(finding))


def assert_sentence(text: str) -> None:
    assert text.isprintable()
    assert len(text) < 700


OUTSIDE = (
    "../../secret",
    "../secret",
    "/etc/passwd",
    "a/../../secret",
    "..",
    ".",
    "",
    "a..b",
    "a/b",
    "a\\b",
    "..\\secret",
    "a\0b",
    "a\n",
    "a b",
    "~",
    "$HOME",
    "blocks.\N{FULLWIDTH DIGIT ZERO}.hook_resid_post",
    "bl\N{CYRILLIC SMALL LETTER O}cks.0.hook_resid_post",
    "a" * 201,
)
NO_PLANS: list[tuple[str, Any]] = [
    *(("request.hooks.0.name", name) for name in OUTSIDE),
    *(("run", name) for name in ("../0", "00000", "0", "0000\n", "\N{FULLWIDTH DIGIT ZERO}000", 0, None)),
    *(("tokens_of", name) for name in ("../..", "0001", "9999", 0)),
    *(("n_sequences", n) for n in (0, -1, (1 << 48) + 1, 10**300, 37.0, 1e300, "37", True, None, [37])),
    *(("request.tokens.context_length", n) for n in (0, -8, 1 << 25, 10**4000, 8.0)),
    *(("segment_size", n) for n in (0, -16, 1 << 41, "16")),
    *(("request.hooks.0.shape", shape) for shape in ([0], [-16], [1 << 25], [2] * 9, [16.0], "16", 16, None)),
    *(("request.model.n_layers", n) for n in (0, 10_001, 1e9, "2")),
    *(("request.dtype", name) for name in ("object", "|O8", "int32", None)),
    *(("request.compression", name) for name in ("blosc", "pickle", 1)),
    *(("request.batch_size", n) for n in (0, 1 << 25)),
    *(("format", n) for n in (0, 2, 10**9, "1", None)),
    ("request.hooks", []),
    ("request.model.config", []),
    ("request.model.__class__", "os.system"),
    ("a" * 100_000, 1),
    ("line\nfeed", 1),
]


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(("place", "value"), NO_PLANS, ids=range(len(NO_PLANS)))
def test_plan_that_none_can_be(store: LocalBlobs, place: str, value: Any, sealed: bool) -> None:
    edit_plan(store, {place: value}, sealed=sealed)
    check_refused(store)


WIDE = {"name": RESID_0, "axes": ["a"] * 8, "shape": [1 << 24] * 8}
VAST: dict[str, dict[str, Any]] = {
    "sequences": {"n_sequences": 1 << 47},
    "segments": {"n_sequences": 1 << 48, "segment_size": 1},
    "one segment": {"n_sequences": 1 << 47, "segment_size": 1 << 40},
    "positions": {"request.tokens.context_length": 1 << 24},
    "values": {"request.hooks.0": WIDE},
    "values of every kind": {"request.hooks.0": WIDE, "n_sequences": 1 << 47, "n_tokens": 1 << 62},
    "layers": {"request.model.n_layers": 10_000},
    "all": {
        "n_sequences": 1 << 48,
        "n_tokens": 1 << 62,
        "segment_size": 1 << 40,
        "request.tokens.context_length": 1 << 24,
        "request.batch_size": 1 << 24,
        "request.hooks.0": WIDE,
    },
}


@pytest.mark.parametrize("value", [True, 1.0])
def test_format_that_only_equals_one(store: LocalBlobs, value: Any) -> None:
    edit_plan(store, {"format": value}, sealed=False)
    check_refused(store)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("kind", VAST)
def test_plan_of_more_than_there_is(store: LocalBlobs, kind: str, sealed: bool) -> None:
    edit_plan(store, VAST[kind], sealed=sealed)
    with nothing_outside(store.root), small_and_quick():
        opened = actstore.open(store.url)
        assert repr(opened)
        assert opened.n_sequences_committed >= 0
        for name in opened.hooks:
            assert len(opened[name].shape) >= 3
            assert opened[name].nbytes > 0
            for row in (0, opened.shape[0] - 1, slice(None)):
                try:
                    assert opened[name][row].nbytes < 1e6  # the values that really exist
                except ActstoreError as error:
                    assert_sentence(str(error))
        for option in ((), ("--json",)):
            done = CliRunner().invoke(cli, ["info", store.url, *option], catch_exceptions=False)
            assert done.exit_code == 0
        verification = actstore.verify(store.url)
    assert bool(verification.damage) or kind == "layers"
    for finding in verification.findings:
        assert_sentence(str(finding))


def test_compressed_rows_larger_than_a_frame(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    make_store(blobs, example_plan(compression="lz4"))
    edit_plan(
        blobs,
        {"request.hooks.0.shape": [1 << 24], "request.tokens.context_length": 1 << 10},
        sealed=True,
    )
    check_refused(blobs)


NO_JSON: dict[str, bytes] = {
    "nothing": b"",
    "no object": signed_body(b"[]"),
    "null": b"null",
    "no text": b"\xff\xfe\x00{",
    "another encoding": '{\n  "checksum": 0,\n  "format": 1\n}\n'.encode("utf-16"),
    "NaN": signed_body(b'  "format": 1,\n  "sealed": true, "runs": [NaN]\n}\n'),
    "infinity": signed_body(b'  "format": 1,\n  "sealed": true, "runs": [-Infinity]\n}\n'),
    "a key twice": signed_body(b'  "format": 1,\n  "sealed": false, "sealed": true, "runs": []\n}\n'),
    "two checksums": signed_body(b'  "checksum": 1,\n  "format": 1,\n  "sealed": true, "runs": []\n}\n'),
    "lists in lists": signed_body(b'  "format": 1,\n  "runs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"),
    "objects in objects": signed_body(
        b'  "format": 1,\n  "runs": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}\n"
    ),
    "a long number": signed_body(b'  "format": 1,\n  "runs": ' + b"9" * 1_000_000 + b"}\n"),
    "half a pair": signed_body(b'  "format": 1,\n  "sealed": true, "runs": ["\\ud800"]\n}\n'),
    "cut": signed_body(b'  "format": 1,\n  "sealed": true, "ru'),
}


@pytest.mark.parametrize("key", [MANIFEST_KEY, PLAN_KEY])
@pytest.mark.parametrize("kind", NO_JSON)
def test_document_that_is_no_document(store: LocalBlobs, kind: str, key: str) -> None:
    if key == PLAN_KEY:
        store.delete(MANIFEST_KEY)
    overwrite(store, key, NO_JSON[kind])
    check_refused(store)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize("depth", [50, 90, 200, 400])
def test_config_of_any_depth(store: LocalBlobs, depth: int) -> None:
    edit_plan(store, {"request.model.config": {"model_type": "gpt2", "a": nested(depth)}}, sealed=True)
    with nothing_outside(store.root), small_and_quick():
        try:
            opened = actstore.open(store.url)
            assert opened.names.n_layers == 12
        except ActstoreError as error:
            assert_sentence(str(error))
        actstore.verify(store.url)


@pytest.mark.parametrize("key", OUTSIDE)
def test_keys_in_records_are_not_followed(store: LocalBlobs, key: str) -> None:
    edit(store, commit_key(RUN, 1), lambda fields: fields["shards"].update({RESID_0: object_at(key)}))
    edit(store, tokens_key(RUN), lambda fields: put(fields, "shards.0", object_at(key)))
    with nothing_outside(store.root), small_and_quick():
        opened = actstore.open(store.url)
        np.testing.assert_array_equal(bits(opened[RESID_0][:]), bits(numbers(example_plan())[RESID_0]))
        assert opened.tokens[0].shape == (LENGTH,)
        assert {(tokens_key(RUN), RUN, None), (commit_key(RUN, 1), RUN, 1)} <= set(found_in(store))


@pytest.mark.parametrize("field", ["shards", "statistics"])
@pytest.mark.parametrize("key", OUTSIDE)
def test_files_of_a_manifest_are_its_own(store: LocalBlobs, key: str, field: str) -> None:
    edit(store, MANIFEST_KEY, lambda fields: put(fields, f"runs.0.{field}", object_at(key)))
    check_refused(store)


def object_at(key: str) -> dict[str, Any]:
    return {"key": key, "nbytes": 6, "crc32c": crc32c(b"secret")}


@pytest.mark.parametrize(
    ("key", "place", "value"),
    [
        (commit_key(RUN, 1), "n_sequences", 1 << 47),
        (commit_key(RUN, 1), "n_tokens", 1 << 62),
        (commit_key(RUN, 1), "segment", 10**30),
        (commit_key(RUN, 0), "golden.sequence", 1 << 61),
        (commit_key(RUN, 0), "golden.errors", {RESID_0: 1e400}),
        (commit_key(RUN, 1), "environment.batch", [1 << 62, 1 << 62]),
        (commit_key(RUN, 1), "statistics", {}),
        (commit_key(RUN, 1), "shards", {}),
        (tokens_key(RUN), "shards", []),
        (tokens_key(RUN), "shards", "tokens/c.0.0"),
    ],
)
def test_records_that_none_can_be(store: LocalBlobs, key: str, place: str, value: Any) -> None:
    edit(store, key, lambda fields: put(fields, place, value))
    with nothing_outside(store.root), small_and_quick():
        damage = [(finding.key, finding.problem) for finding in actstore.verify(store.url).damage]
    if place != "environment.batch":
        assert key in dict(damage)
    for _, problem in damage:
        assert_sentence(problem)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("sum", "A" * 10),
        ("sum", "A" * 1_000_000),
        ("count", (1 << 63) - 1),
        ("sum_of_norms", 1.7e308),
        ("norms", {"n_zero": (1 << 63) - 1, "buckets": []}),
        ("norms", {"n_zero": 0, "buckets": [[6000, 1 << 62]] * 2}),
        ("second_moment", "A" * 1088),
        ("second_moment", ""),
    ],
)
def test_statistics_that_none_can_be(store: LocalBlobs, place: str, value: Any) -> None:
    edit(store, commit_key(RUN, 1), lambda fields: fields["statistics"][RESID_0].update({place: value}))
    store.delete(MANIFEST_KEY)
    with nothing_outside(store.root), small_and_quick():
        assert found_in(store) == [(commit_key(RUN, 1), RUN, 1)]
        try:
            assert repr(actstore.open(store.url).stats(RESID_0))
        except ActstoreError as error:
            assert_sentence(str(error))


CONFIGS: dict[str, dict[str, Any]] = {
    "no such model": {"model_type": "none"},
    "no model": {},
    "a type of another type": {"model_type": ["gpt2"]},
    "layers without end": {"n_layer": 10**12},
    "labels without end": {"num_labels": 10**9},
    "sizes of another type": {"model_type": "llama", "hidden_size": "large"},
    "no heads": {"model_type": "llama", "num_attention_heads": 0},
    "lists without end": {"model_type": "gpt_neo", "attention_types": [[["global"], 10**12]]},
    "experts without end": {"model_type": "qwen2_moe", "num_experts": 10**9},
    "layers inside": {"model_type": "llama", "text_config": {"num_hidden_layers": 10**9}},
    "a number without end": {"vocab_size": 10**300},
    "a method": {"to_dict": "x"},
    "a class": {"__class__": "x"},
    "a family without an entry": {"model_type": "mpt", "n_layers": 10**6},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_that_no_model_has(store: LocalBlobs, kind: str) -> None:
    config = (
        {} if "model_type" in CONFIGS[kind] or kind == "no model" else {"model_type": "gpt2"}
    ) | CONFIGS[kind]
    edit_plan(store, {"request.model.config": config}, sealed=True)
    with small_and_quick():
        opened = actstore.open(store.url)
        for use in (lambda: opened.names, lambda: opened.cache(0)):
            with pytest.raises(ActstoreError) as caught:
                use()
            assert_sentence(str(caught.value))
        assert opened[RESID_0][0].shape == (LENGTH, 16)


def test_config_that_asks_for_code(store: LocalBlobs, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    config = {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 2,
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
        "trust_remote_code": True,
        "_name_or_path": str(model),
        "name_or_path": str(model),
    }
    assert actstore.open(store.url).names.n_layers == 2  # imports are done now
    edit_plan(store, {"request.model.config": config, "request.model.name": str(model)}, sealed=True)
    with nothing_outside(store.root), small_and_quick():
        opened = actstore.open(store.url)
        assert opened.names.n_layers == 2
        assert opened.cache(0)[RESID_0].shape == (1, LENGTH, 16)
    assert not (tmp_path / "ran").exists()


def rows_of(n_rows: int) -> pa.Table:
    fields = {"array": "acts/a", "shard": 0, "key": "acts/a/c.0.0.0", "nbytes": 1, "crc32c": 1}
    return pa.table({name: [value] * n_rows for name, value in fields.items()}, schema=SHARDS_SCHEMA)


def written(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    return bytes(sink.getvalue().to_pybytes())


def with_other_count(data: bytes, n_rows: int, footer_rows: int) -> bytes:
    """A file whose footer has another number of rows than its groups."""
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    zigzag = 2 * n_rows
    there = bytes([zigzag & 0x7F | 0x80, zigzag >> 7 & 0x7F | 0x80, zigzag >> 14])
    here = data.index(there, footer)  # the first match is that of the file
    return data[:here] + bytes([2 * footer_rows | 0x80, 0x80, 0]) + data[here + 3 :]


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil",))


def with_extension() -> bytes:
    import pickle

    payload: dict[bytes | str, bytes | str] = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    payload[b"ARROW:extension:metadata"] = pickle.dumps(Evil())
    table = rows_of(13)
    schema = SHARDS_SCHEMA.set(0, SHARDS_SCHEMA.field(0).with_metadata(payload))
    return written(table.cast(schema))


TABLES: dict[str, Callable[[], bytes]] = {
    "not Parquet": lambda: b"secret" * 100,
    "only the ends": lambda: b"PAR1" + bytes(100) + b"PAR1",
    "a footer larger than the file": lambda: b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1",
    "other values": lambda: written(rows_of(13)),
    "more rows": lambda: written(rows_of(1_000_000)),
    "more rows than it says": lambda: with_other_count(written(rows_of(1_000_000)), 1_000_000, 13),
    "other columns": lambda: written(pa.table({"a": [[1] * 1000] * 13})),
    "wide values": lambda: written(
        rows_of(13).set_column(2, "key", pa.array(["a" * 10_000_000] * 13, pa.string()))
    ),
    "types that unpickle": with_extension,
    "another type": lambda: written(rows_of(13).set_column(1, "shard", pa.array([0] * 13, pa.int64()))),
}


@pytest.mark.parametrize("kind", TABLES)
def test_table_of_shards_that_none_can_be(
    store: LocalBlobs, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(store, shards_key(RUN), TABLES[kind]())
    monkeypatch.chdir(tmp_path)
    with nothing_outside(store.root), small_and_quick():
        before = pa.total_allocated_bytes()
        pool = pa.default_memory_pool()
        peak = pool.max_memory()
        assert actstore.open(store.url)[RESID_0][0].shape == (LENGTH, 16)
        assert found_in(store) == [(shards_key(RUN), RUN, None)]
    assert (pool.max_memory() or 0) <= max((peak or 0), before + 200e6)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize(
    ("place", "value"),
    [(4, (1 << 31) - 17), (4, 0), (8, 1 << 30), (12, (1 << 32) - 1), (12, 0), (0, 0xFF), (0, 0)],
)
def test_frames_that_announce_other_sizes(tmp_path: Path, compression: Any, place: int, value: int) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    make_store(blobs, example_plan("bfloat16", compression))
    data = bytearray(bytes(blobs.read(SHARD)))
    data[place : place + (4 if place else 1)] = value.to_bytes(4 if place else 1, "little")
    overwrite(blobs, SHARD, bytes(data))
    with nothing_outside(blobs.root), small_and_quick():
        opened = actstore.open(blobs.url)
        with pytest.raises(StorageError) as caught:
            opened[RESID_0][20]
        assert_sentence(str(caught.value))
        assert found_in(blobs) == [(SHARD, RUN, 1)]


def test_metadata_that_says_otherwise_is_not_asked(store: LocalBlobs) -> None:
    key = f"acts/{RESID_0}/zarr.json"
    metadata = json.loads(bytes(store.read(key)))
    metadata["shape"] = [1 << 60, LENGTH, 16]
    metadata["codecs"][0]["configuration"]["chunk_shape"] = [1, 1, 1]
    overwrite(store, key, to_json(metadata))
    with nothing_outside(store.root), small_and_quick():
        opened = actstore.open(store.url)
        assert opened[RESID_0].shape == (N, LENGTH, 16)
        np.testing.assert_array_equal(bits(opened[RESID_0][:]), bits(numbers(example_plan())[RESID_0]))
        assert found_in(store) == [(key, RUN, None)]


@pytest.mark.parametrize("name", ["\N{FULLWIDTH DIGIT ZERO}001", "00001", "abcd", "0001 ", "-001"])
def test_folders_that_are_no_runs_are_passed_over(store: LocalBlobs, name: str) -> None:
    store.delete(MANIFEST_KEY)
    store.create(f"_actstore/runs/{name}/plan.json", [bytes(store.read(PLAN_KEY))])
    opened = actstore.open(store.url)
    assert [run.plan.run for run in opened.runs] == [RUN]
    assert found_in(store) == []


def test_records_under_look_alikes_commit_nothing(store: LocalBlobs) -> None:
    store.delete(MANIFEST_KEY)
    record = bytes(store.read(commit_key(RUN, 1)))
    store.delete(commit_key(RUN, 1))
    store.create(commit_key(RUN, 1).replace("1.", "\N{FULLWIDTH DIGIT ONE}."), [record])
    with pytest.raises(actstore.errors.NotCommittedError):
        actstore.open(store.url)[RESID_0][16]


def test_links_are_followed(store: LocalBlobs, tmp_path: Path) -> None:
    """Whoever links a shard to another disk does it on purpose; no document can make a link."""
    moved = tmp_path / "elsewhere"
    (store.root / SHARD).rename(moved)
    (store.root / SHARD).symlink_to(moved)
    np.testing.assert_array_equal(
        bits(actstore.open(store.url)[RESID_0][:]), bits(numbers(example_plan())[RESID_0])
    )
    assert found_in(store) == []


def test_the_guards_of_these_tests_see_what_they_are_for(store: LocalBlobs, tmp_path: Path) -> None:
    import pickle

    with pytest.raises(AssertionError), nothing_outside(store.root):
        (tmp_path / "secret").read_text()
    with pytest.raises(AssertionError), nothing_outside(store.root):
        list(tmp_path.iterdir())
    with pytest.raises(AssertionError), nothing_outside(store.root):
        pickle.loads(pickle.dumps(Path))
    with pytest.raises(AssertionError), small_and_quick():
        assert len(bytearray(210_000_000))


_UNPICKLES = re.compile(
    r"\b(c?pickle|_pickle|dill|cloudpickle|shelve|marshal|joblib)\b|torch\.load|(np|numpy)\.load|"
    r"allow_pickle=True|\bread_pickle\b|weights_only|\beval\(|\bexec\("
)
_HARMLESS = re.compile(
    r"np\.load\([^()]+, allow_pickle=False\)|allow_pickle=False|\.eval\(\)|def eval\(self\)"
)


def test_no_source_unpickles() -> None:
    sources = [path for folder in _SOURCES for path in folder.rglob("*.py")]
    assert len(sources) > 80
    lines = [(path, line) for path in sources for line in path.read_text().splitlines()]
    assert [(path.name, line) for path, line in lines if _UNPICKLES.search(_HARMLESS.sub("", line))] == []
