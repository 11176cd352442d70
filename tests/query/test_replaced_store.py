"""A store is replaced by another one while clients read it: they get the first one, or an error."""

import pickle
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

import actstore
from actstore.errors import StoreReplacedError
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.records.seal import seal, unseal
from tests.conftest import S3Server
from tests.query.running import Running, running
from tests.store.arrays import random_bits
from tests.store.example import HOOKS, LENGTH, example_plan, write_store
from tests.store.runs import bytes_below, hooks_run, write_run

pytestmark = pytest.mark.s3

A = HOOKS[0]
N, SEGMENT, BATCH = 32, 8, 32
FIRST, OTHER = 100, 200
"""Seeds of the values of the two stores. Their plans are equal, so that only the contents differ."""
WINDOWS: Final[dict[str, Any]] = {"shuffle": "window", "window_rows": SEGMENT * LENGTH}
GLOBAL: Final[dict[str, Any]] = {"shuffle": "global"}

Put = Callable[[], None]


def values(seed: int) -> Any:
    """Values of the hook that is read."""
    return random_bits(plan(None).activations(plan(None).request.hooks[0]), seed)


def plan(compression: Any, **changes: Any) -> Any:
    return example_plan(
        "float32", compression, n_sequences=N, n_tokens=N * LENGTH, segment_size=SEGMENT, **changes
    )


def write(blobs: Blobs, seed: int, compression: Any = None) -> None:
    made = plan(compression)
    columns = {
        hook.name: random_bits(made.activations(hook), seed + n) for n, hook in enumerate(made.request.hooks)
    }
    write_store(blobs, made, columns, range(made.n_segments))
    seal(blobs)


class Replaceable:
    """A store, and another one that can take its place."""

    def __init__(self, url: str, spare: Path, how: str, compression: Any = None) -> None:
        self.url = url
        self._how = how
        self._spare = spare
        self._blobs = open_blobs(url)
        write(self._blobs, FIRST, compression)
        write(LocalBlobs(spare), OTHER, compression)
        self.first = {data for key, data in bytes_below(self._blobs).items() if "/c." in key}
        """Bytes of every shard of the first store."""
        self.other = {data for key, data in bytes_below(LocalBlobs(spare)).items() if "/c." in key}

    def replace(self) -> None:
        """Put the other store in its place: deleted and made again, renamed over, or written over key by key."""
        if isinstance(self._blobs, LocalBlobs):
            if self._how == "rename":
                Path(self.url).rename(f"{self._spare}-aside")
                self._spare.rename(self.url)
            else:
                shutil.rmtree(self.url)
                shutil.copytree(self._spare, self.url)
            return
        objects = bytes_below(LocalBlobs(self._spare))
        for key, data in objects.items():
            if self._how == "delete":
                self._blobs.delete(key)
                assert self._blobs.create(key, [data])
            else:
                info = self._blobs.head(key)
                assert info is not None
                assert self._blobs.replace(key, [data], expected=info.tag)


def taken(read: Callable[[], Any], expected: np.ndarray[Any, Any]) -> str:
    """Outcome of a read: ``same`` bytes as the first store, ``refused``, or ``foreign``."""
    try:
        values = read()
    except StoreReplacedError:
        return "refused"
    bits = np.ascontiguousarray(values.numpy() if isinstance(values, torch.Tensor) else values).view(np.uint8)
    return "same" if np.array_equal(bits, np.ascontiguousarray(expected).view(np.uint8)) else "foreign"


def slices(store: actstore.Store) -> Iterator[str]:
    """Read every row: three rows at once, a position of one, and all. Yields the outcomes."""
    known = values(FIRST)
    for row in range(0, N, 7):
        yield taken(partial(store[A].numpy, slice(row, row + 3)), known[row : row + 3])
        yield taken(partial(store[A].numpy, (row, 2)), known[row, 2])
        yield taken(partial(store[A].numpy, ([row, N - 1], slice(1, 3))), known[[row, N - 1], 1:3])
    yield taken(lambda: store[A].numpy(slice(None)), known)


def batches(loader: Any) -> Iterator[str]:
    """Read all batches of an epoch, one by one, and then in turn. Yields the outcomes."""
    known = values(FIRST)

    def expected(k: int) -> Any:
        sequences, positions = loader.rows(k)
        return known[sequences, positions]

    for k in range(loader.n_batches):
        yield taken(partial(loader.batch, k), expected(k))
    for k in range(loader.n_batches):
        outcome = taken(lambda: next(loader), expected(k))
        yield outcome
        if outcome == "refused":
            break


def count(store: actstore.Store, replaceable: Replaceable, options: dict[str, Any]) -> Counter[str]:
    """Read some, replace the store, and read all; return the counts of outcomes."""
    known = values(FIRST)
    assert taken(lambda: store[A].numpy(0), known[0]) == "same"
    with store.loader(A, batch_size=BATCH, **options) as loader:
        sequences, positions = loader.rows(0)
        assert taken(lambda: loader.batch(0), known[sequences, positions]) == "same"
        replaceable.replace()
        outcomes = Counter([*batches(loader), *slices(store)])
    # Opening it again gives the other store, all of it.
    with actstore.open(store.url).loader(A, batch_size=BATCH, **options) as loader:
        for k in range(loader.n_batches):
            sequences, positions = loader.rows(k)
            assert np.array_equal(
                loader.batch(k).numpy().view(np.uint32), values(OTHER)[sequences, positions].view(np.uint32)
            )
    assert not outcomes["foreign"], outcomes
    assert outcomes["refused"], outcomes
    return outcomes


@pytest.mark.parametrize("how", ["delete", "rename"])
@pytest.mark.parametrize(
    ("compression", "options"), [(None, GLOBAL), (None, WINDOWS), ("lz4", WINDOWS)], ids=str
)
def test_on_disk(how: str, compression: Any, options: dict[str, Any], tmp_path: Path) -> None:
    replaceable = Replaceable(str(tmp_path / "store"), tmp_path / "spare", how, compression)
    outcomes = count(actstore.open(replaceable.url), replaceable, options)
    if compression is None:
        assert (
            outcomes["same"] >= 2 * N * LENGTH // BATCH
        )  # files that are mapped stay, whatever gets their names


@pytest.mark.parametrize(("compression", "how"), [(None, "over"), ("lz4", "delete")])
@pytest.mark.parametrize("client", ["s3fs", "obstore"])
def test_on_s3(
    client: str, compression: Any, how: str, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTSTORE_S3", client)
    replaceable = Replaceable(s3_url, tmp_path / "spare", how, compression)
    count(actstore.open(s3_url), replaceable, WINDOWS)


@pytest.mark.parametrize(
    ("compression", "options", "how"),
    [(None, GLOBAL, "delete"), (None, WINDOWS, "over"), ("lz4", WINDOWS, "delete")],
)
def test_in_a_cache(compression: Any, options: dict[str, Any], how: str, s3_url: str, tmp_path: Path) -> None:
    replaceable = Replaceable(s3_url, tmp_path / "spare", how, compression)
    cache = tmp_path / "cache"
    count(actstore.open(s3_url), replaceable, {**options, "cache_dir": cache})
    folders = [path for path in (cache / "actstore-shards").iterdir() if path.is_dir()]
    assert len(folders) == 2
    for folder in folders:
        shards = {path.read_bytes() for path in folder.rglob("c.*")}
        assert shards <= replaceable.first or shards <= replaceable.other


@pytest.fixture(scope="module")
def roots(
    s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Running, dict[str, Replaceable]]]]:
    """A server of stores on disk, and one of stores on S3; each store is for one test."""
    folder = tmp_path_factory.mktemp("replaced")
    s3_root = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"
    ways = {
        "disk": (str(folder / "root"), "rename", ("slices", "served", "direct")),
        "s3": (s3_root, "delete", ("slices", "served", "direct")),
    }
    stores = {
        kind: {name: Replaceable(f"{root}/{name}", folder / f"{kind}-{name}", how) for name in names}
        for kind, (root, how, names) in ways.items()
    }
    (folder / "disk").mkdir()
    (folder / "s3").mkdir()
    with (
        running(folder / "disk", "--root", str(folder / "root")) as disk,
        running(folder / "s3", "--root", s3_root) as s3,
    ):
        yield {"disk": (disk, stores["disk"]), "s3": (s3, stores["s3"])}


@pytest.mark.parametrize("kind", ["disk", "s3"])
@pytest.mark.parametrize(("name", "direct"), [("served", False), ("direct", True)])
def test_served(kind: str, name: str, direct: bool, roots: Any) -> None:
    server, stores = roots[kind]
    # The server must not go on giving its last bytes under the name of the store.
    count(server.store(name, direct=direct), stores[name], WINDOWS)


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_labels_of_a_server(kind: str, roots: Any) -> None:
    """All bytes under the label of a store are of that store, even at the moment in which it is replaced."""
    server, stores = roots[kind]
    url = f"{server.url}/v1/stores/slices/hooks/{A}/slice?seq=0:1"
    seen = dict(_labelled(url) for _ in range(3))
    stores["slices"].replace()
    labelled = [*seen.items(), *(_labelled(url) for _ in range(20))]
    seeds = {FIRST: values(FIRST)[:1].tobytes(), OTHER: values(OTHER)[:1].tobytes()}
    by_label = {
        label: {body for reply_label, body in labelled if reply_label == label} for label, _ in labelled
    }
    assert sorted(map(len, by_label.values())) == [1, 1]
    assert {body for bodies in by_label.values() for body in bodies} == set(seeds.values())


def test_a_server_whose_store_grows_names_it_in_few_characters(tmp_path: Path) -> None:
    """A client that has it open goes on, and notices when another store takes its place."""
    names = (
        "blocks.0.hook_mlp_out",
        "blocks.0.hook_attn_out",
        "blocks.1.hook_mlp_out",
        "blocks.1.hook_attn_out",
    )
    replaceable = Replaceable(str(tmp_path / "root" / "one"), tmp_path / "spare", "rename")
    blobs = LocalBlobs(tmp_path / "root" / "one")
    (tmp_path / "log").mkdir()
    with running(tmp_path / "log", "--root", str(tmp_path / "root")) as server:
        store = server.store("one", direct=False)
        url = f"{server.url}/v1/stores/one/hooks/{A}/slice?seq=0:1"
        labels = {_labelled(url)[0]}
        for number, name in enumerate(names, 1):
            unseal(blobs)
            write_run(blobs, hooks_run(f"{number:04}", name, over=plan(None)))
            seal(blobs)
            assert _until(lambda: _labelled(url)[0] not in labels)
            labels.add(_labelled(url)[0])
            assert store[A].numpy(slice(None)).tobytes() == values(FIRST).tobytes()
        assert len(labels) == len(names) + 1
        assert {len(str(label)) for label in labels} == {34}
        newer = store.newer()
        assert type(newer) is type(store)
        assert set(names) <= set(newer.hooks)
        assert newer.newer() is newer
        store.refresh()
        assert set(names) <= set(store.hooks)
        replaceable.replace()
        # Its plan is that of the first run, so that only the contents differ.
        assert _until(lambda: _labelled(url)[1] == values(OTHER)[:1].tobytes())
        with pytest.raises(StoreReplacedError, match="open it again"):
            store[A].numpy(0)


def _until(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if is_so():
            return True
        time.sleep(0.1)
    return False


def _labelled(url: str) -> tuple[str | None, bytes]:
    """Label and bytes of a reply; repeated while the server is busy."""
    import httpx

    while True:
        reply = httpx.get(url)
        if reply.status_code != 503:
            reply.raise_for_status()
            return reply.headers.get("Actstore-Contents"), reply.content


def test_a_process_of_its_own_opens_the_same_store(tmp_path: Path) -> None:
    replaceable = Replaceable(str(tmp_path / "store"), tmp_path / "spare", "rename")
    store = actstore.open(replaceable.url)
    with store.loader(A, batch_size=BATCH) as loader:
        copies = [pickle.dumps(store), pickle.dumps(loader)]
    for copy in copies:
        pickle.loads(copy)
    replaceable.replace()
    for copy in copies:
        with pytest.raises(StoreReplacedError, match="open it again"):
            pickle.loads(copy)
    for again in (store.reopened, store.refresh, store.newer):
        with pytest.raises(StoreReplacedError, match="open it again"):
            again()
