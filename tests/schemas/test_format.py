"""``schemas/format.md`` is true: its example is a real store, read here by the arithmetic of the page alone."""

import base64
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import actstore
from actstore.errors import NotCommittedError
from actstore.store.format.plan import Plan

PAGE = Path(__file__).parents[2] / "schemas" / "format.md"
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
LENGTH = 16
N_DOCUMENTS = 10
N_DOCUMENT_TOKENS = 45


def _block(name: str) -> dict[str, Any]:
    """The content of a fenced block ``json <name>`` of the page."""
    match = re.search(rf"^```json {name}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert match is not None, name
    block: dict[str, Any] = json.loads(match[1])
    return block


def _document(number: int) -> list[int]:
    return [1 + (7 * number + 3 * offset) % 299 for offset in range(N_DOCUMENT_TOKENS)]


@dataclass(frozen=True)
class _Example:
    """The store of the example: 30 sequences, 6 of them in the last of 3 segments."""

    root: Path
    fields: dict[str, Any]

    def json(self, key: str) -> Any:
        return json.loads((self.root / key).read_bytes())

    def array(self, path: str) -> "_Reader":
        return _Reader(self.root, path, self.json(f"{path}/zarr.json"))


class _Reader:
    """A reader according to sections 5 to 7 of the page; it uses nothing of actstore."""

    def __init__(self, root: Path, path: str, metadata: dict[str, Any]) -> None:
        self.root = root
        self.path = path
        self.shape: list[int] = metadata["shape"]
        self.shard_sequences: int = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        self.chunk_sequences: int = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
        itemsize: int = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "int64": 8}[
            metadata["data_type"]
        ]
        self.sequence_nbytes: int = math.prod(self.shape[1:]) * itemsize
        self.index_nbytes = 16 * (self.shard_sequences // self.chunk_sequences) + 4

    def key(self, shard: int) -> str:
        return f"{self.path}/c.{shard}" + ".0" * (len(self.shape) - 1)

    def n_sequences(self, shard: int) -> int:
        return min(self.shard_sequences, self.shape[0] - shard * self.shard_sequences)

    def data_nbytes(self, shard: int) -> int:
        return (
            math.ceil(self.n_sequences(shard) / self.chunk_sequences)
            * self.chunk_sequences
            * self.sequence_nbytes
        )

    def place(self, sequence: int) -> tuple[str, int, int]:
        """(key, offset, length) of a sequence."""
        shard, within = divmod(sequence, self.shard_sequences)
        return self.key(shard), within * self.sequence_nbytes, self.sequence_nbytes

    def bytes_at(self, key: str, offset: int, length: int) -> bytes:
        return (self.root / key).read_bytes()[offset : offset + length]

    def index(self, shard: int) -> bytes:
        chunk_nbytes = self.chunk_sequences * self.sequence_nbytes
        n_chunks = self.data_nbytes(shard) // chunk_nbytes
        pairs = [
            (k * chunk_nbytes, chunk_nbytes) if k < n_chunks else (2**64 - 1, 2**64 - 1)
            for k in range(self.shard_sequences // self.chunk_sequences)
        ]
        encoded = b"".join(struct.pack("<QQ", *pair) for pair in pairs)
        return encoded + struct.pack("<I", google_crc32c.value(encoded))

    @property
    def shards(self) -> range:
        return range(math.ceil(self.shape[0] / self.shard_sequences))


@pytest.fixture(scope="module")
def example(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> _Example:
    folder = tmp_path_factory.mktemp("format")
    lines = [json.dumps({"input_ids": _document(number)}) for number in range(N_DOCUMENTS)]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    fields: dict[str, Any] = {
        "model": str(tiny_model("llama")),
        "tokens": str(folder / "corpus.jsonl"),
        "hooks": HOOKS,
        "context_length": LENGTH,
        "begin_batch_token": 0,
        "segment_size": 12,
        "batch_size": 4,
        "dtype": "bfloat16",
        "device": "cpu",
    }
    actstore.extract(actstore.plan(out=str(folder / "store"), **fields))
    return _Example(folder / "store", fields)


def test_array_metadata(example: _Example) -> None:
    assert example.json(f"acts/{HOOKS[1]}/zarr.json") == _block("zarr-json")
    assert example.json("zarr.json")["attributes"] == _block("root-attributes")


def test_example_activation(example: _Example) -> None:
    shown = _block("example-activation")
    array = example.array(f"acts/{shown['hook']}")
    key, offset, length = array.place(shown["sequence"])
    position_length = length // LENGTH
    assert shown == {
        "hook": shown["hook"],
        "sequence": shown["sequence"],
        "position": shown["position"],
        "segment": shown["sequence"] // example.json("_actstore/runs/0000/plan.json")["segment_size"],
        "key": key,
        "sequence_nbytes": array.sequence_nbytes,
        "sequence_offset": offset,
        "sequence_length": length,
        "position_offset": offset + shown["position"] * position_length,
        "position_length": position_length,
    }
    stored = actstore.open(str(example.root))[shown["hook"]].numpy((shown["sequence"], shown["position"]))
    assert array.bytes_at(key, shown["position_offset"], position_length) == stored.tobytes()


def test_example_last_shard(example: _Example) -> None:
    shown = _block("example-last-shard")
    array = example.array(f"acts/{HOOKS[1]}")
    last = array.shards[-1]
    data = (example.root / shown["key"]).read_bytes()
    assert shown["key"] == array.key(last)
    assert shown["sequences"] == array.n_sequences(last)
    assert shown["chunks_present"] * array.chunk_sequences == shown["sequences"] + shown["padding_sequences"]
    assert shown["data_nbytes"] == array.data_nbytes(last)
    assert shown["index_nbytes"] == array.index_nbytes
    assert shown["object_nbytes"] == len(data) == shown["data_nbytes"] + shown["index_nbytes"]
    assert bytes.fromhex("".join(shown["index_hex"])) == data[shown["data_nbytes"] :] == array.index(last)
    padding = data[shown["sequences"] * array.sequence_nbytes : shown["data_nbytes"]]
    assert padding == bytes(shown["padding_sequences"] * array.sequence_nbytes)


def test_example_tokens(example: _Example) -> None:
    shown = _block("example-tokens")
    array = example.array("tokens")
    key, offset, length = array.place(shown["sequence"])
    size = (example.root / key).stat().st_size
    assert shown == {
        "sequence": shown["sequence"],
        "key": key,
        "offset": offset,
        "length": length,
        "object_nbytes": size,
    }
    assert size == array.data_nbytes(0) + array.index_nbytes


def test_a_reader_made_from_the_page_reads_what_actstore_reads(example: _Example) -> None:
    store = actstore.open(str(example.root))
    expected: dict[str, NDArray[Any]] = {f"acts/{hook}": store[hook].numpy() for hook in store.hooks}
    expected |= {name: getattr(store, name)[:] for name in ("tokens", "lengths", "documents", "offsets")}
    for path, values in expected.items():
        array = example.array(path)
        assert list(values.shape) == array.shape
        for sequence in range(array.shape[0]):
            assert array.bytes_at(*array.place(sequence)) == values[sequence].tobytes()
        for shard in array.shards:
            data = (example.root / array.key(shard)).read_bytes()
            assert data[array.data_nbytes(shard) :] == array.index(shard)


def test_every_key_is_on_the_page(example: _Example) -> None:
    groups = {"zarr.json", "acts/zarr.json", "norms/zarr.json", "_actstore/zarr.json"}
    arrays = [f"acts/{hook}" for hook in HOOKS] + ["norms/0000", "tokens", "lengths", "documents", "offsets"]
    metadata = {f"{path}/zarr.json" for path in arrays}
    shards = {array.key(i) for array in map(example.array, arrays) for i in array.shards}
    run = "_actstore/runs/0000"
    commits = {f"{run}/commits/{segment:08d}.json" for segment in range(3)}
    keys = {path.relative_to(example.root).as_posix() for path in example.root.rglob("*") if path.is_file()}
    files = ("plan.json", "tokens.json", "shards.parquet", "statistics.json")
    documents = {"_actstore/manifest.json", *(f"{run}/{name}" for name in files)}
    assert keys == groups | metadata | shards | commits | documents


def test_documents_are_spelled_as_the_page_says(example: _Example) -> None:
    for path in example.root.rglob("*.json"):
        document = json.loads(path.read_bytes())
        data = path.read_bytes()
        assert data == (json.dumps(document, indent=2, sort_keys=True) + "\n").encode("ascii")
        if path.name != "zarr.json":
            first, second, rest = data.split(b"\n", 2)
            assert (first, second) == (b"{", b'  "checksum": %d,' % google_crc32c.value(rest))


def test_records_describe_the_objects(example: _Example) -> None:
    run = "_actstore/runs/0000"
    plan = example.json(f"{run}/plan.json")
    tokens = example.json(f"{run}/tokens.json")["shards"]
    assert [record["key"] for record in tokens] == [
        "tokens/c.0.0",
        "lengths/c.0",
        "documents/c.0.0",
        "offsets/c.0.0",
    ]
    records = list(tokens)
    for segment in range(3):
        commit = example.json(f"{run}/commits/{segment:08d}.json")
        assert commit["segment"] == segment
        assert commit["n_sequences"] == min(12, 30 - 12 * segment)
        assert set(commit["shards"]) == {hook["name"] for hook in plan["request"]["hooks"]}
        for hook, record in commit["shards"].items():
            assert record["key"] == f"acts/{hook}/c.{segment}.0.0"
            records.append(record)
        assert commit["norms"]["key"] == f"norms/0000/c.{segment}.0.0"
        records.append(commit["norms"])
    for record in records:
        data = (example.root / record["key"]).read_bytes()
        assert (len(data), google_crc32c.value(data)) == (record["nbytes"], record["crc32c"])
    ids = actstore.open(str(example.root)).tokens[:]
    assert plan["tokens_sha256"] == hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()


def test_manifest_sums_up_the_records(example: _Example) -> None:
    manifest = example.json("_actstore/manifest.json")
    assert manifest["sealed"]
    run = manifest["runs"][0]
    folder = "_actstore/runs/0000"
    assert run["plan"] == {k: v for k, v in example.json(f"{folder}/plan.json").items() if k != "checksum"}
    for name in ("shards", "statistics"):
        data = (example.root / run[name]["key"]).read_bytes()
        assert (len(data), google_crc32c.value(data)) == (run[name]["nbytes"], run[name]["crc32c"])
    shards = list(example.json(f"{folder}/tokens.json")["shards"])
    commits = [example.json(f"{folder}/commits/{segment:08d}.json") for segment in range(3)]
    shards += [commit["shards"][hook] for hook in HOOKS for commit in commits]
    shards += [commit["norms"] for commit in commits]
    rows = pq.read_table(example.root / run["shards"]["key"]).to_pylist()
    assert [{key: row[key] for key in ("crc32c", "key", "nbytes")} for row in rows] == shards
    assert all(row["key"].startswith(f"{row['array']}/c.{row['shard']}") for row in rows)


def test_statistics_are_what_the_page_says(example: _Example) -> None:
    store = actstore.open(str(example.root))
    for segment in range(3):
        record = example.json(f"_actstore/runs/0000/commits/{segment:08d}.json")
        for hook in HOOKS:
            statistics = record["statistics"][hook]
            values = store[hook][12 * segment : min(30, 12 * segment + 12)].double().numpy().reshape(-1, 64)
            norms = np.linalg.norm(values, axis=1)
            assert statistics["count"] == record["n_tokens"] == len(values)
            total = np.frombuffer(base64.b64decode(statistics["sum"]), "<f8")
            np.testing.assert_allclose(total, values.sum(axis=0), atol=1e-9)
            assert statistics["sum_of_norms"] == pytest.approx(norms.sum())
            assert statistics["sum_of_squared_norms"] == pytest.approx((norms**2).sum())
            assert (statistics["max_abs"], statistics["n_not_finite"]) == (np.abs(values).max(), 0)
            g = 1.01 / 0.99
            buckets = np.unique(np.ceil(np.log(norms) / np.log(g)).astype(int), return_counts=True)
            assert statistics["norms"]["buckets"] == [
                list(pair) for pair in zip(*(x.tolist() for x in buckets), strict=True)
            ]


def test_norms_are_what_the_page_says(example: _Example) -> None:
    store = actstore.open(str(example.root))
    metadata = example.json("norms/0000/zarr.json")
    assert metadata["attributes"] == {"hooks": HOOKS}
    assert metadata["dimension_names"] == ["sequence", "hook", "position"]
    assert (metadata["shape"], metadata["data_type"]) == ([30, 2, LENGTH], "float32")
    array = example.array("norms/0000")
    for sequence in range(30):
        norms = np.frombuffer(array.bytes_at(*array.place(sequence)), "<f4").reshape(2, LENGTH)
        for number, hook in enumerate(HOOKS):
            exact = np.linalg.norm(store[hook][sequence].double().numpy(), axis=1)
            np.testing.assert_array_max_ulp(norms[number], exact.astype(np.float32), maxulp=1)
            np.testing.assert_array_equal(store[hook].norms[sequence], norms[number])


def test_provenance(example: _Example) -> None:
    store = actstore.open(str(example.root))
    ids, documents, offsets = store.tokens[:], store.documents[:], store.offsets[:]
    inserted = documents == -1
    assert np.array_equal(inserted, offsets == -1)
    assert np.array_equal(inserted, np.broadcast_to(np.arange(LENGTH) == 0, inserted.shape))
    assert np.all(ids[inserted] == 0)
    for at in map(tuple, np.argwhere(~inserted)):
        assert ids[at] == _document(documents[at])[offsets[at]]
    assert store.lengths[:].tolist() == [LENGTH] * 30


@pytest.mark.parametrize("context_length", [1, 3, 10, 16, 24, 40, 62, 100, 128, 1000, 2048, 4096])
def test_sequences_of_a_token_shard(context_length: int) -> None:
    example = PAGE.parent / "examples" / "valid" / "plan-token-ids.json"
    fields = json.loads(example.read_bytes())
    fields["request"]["tokens"]["context_length"] = context_length
    plan = Plan.model_validate_json(json.dumps({k: v for k, v in fields.items() if k != "checksum"}))
    for layout in plan.token_arrays():
        assert layout.shard_rows == 1024 * max(1, 16777216 // (8192 * context_length))
        assert layout.shard_rows % layout.chunk_rows == 0


def test_stored_order_is_the_permutation_of_the_seed(example: _Example, tmp_path: Path) -> None:
    actstore.extract(actstore.plan(out=str(tmp_path / "seeded"), seed=7, **example.fields))
    order = np.random.Generator(np.random.PCG64(7)).permutation(30)
    plain, seeded = actstore.open(str(example.root)), actstore.open(str(tmp_path / "seeded"))
    for name in ("tokens", "documents", "offsets", "lengths"):
        assert np.array_equal(getattr(seeded, name)[:], getattr(plain, name)[:][order])


def test_stores_of_one_plan_are_equal_byte_for_byte_also_after_an_interruption(
    example: _Example, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    actstore.extract(actstore.plan(out=str(root), **example.fields))
    # As if the run was killed between the shards and the commit of one segment, and before the shards of another.
    (root / "_actstore/manifest.json").unlink()
    (root / "_actstore/runs/0000/commits/00000000.json").unlink()
    (root / "_actstore/runs/0000/commits/00000002.json").unlink()
    (root / f"acts/{HOOKS[0]}/c.2.0.0").unlink()
    store = actstore.open(str(root))
    with pytest.raises(NotCommittedError):
        store[HOOKS[0]][0]
    report = actstore.extract(actstore.plan(out=str(root), **example.fields))
    assert report.n_segments_before == 1
    assert _objects(root) == _objects(example.root)


def _objects(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }
