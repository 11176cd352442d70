"""Links in served stores: none leads out, whatever its target, and only files are read."""

import errno
import http.client
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import pytest

import actstore
from actstore.errors import StorageError
from actstore.query.client.served_store import ServedStore
from actstore.query.server.catalog.beneath import FILE, FOLDER, PATH_ONLY, open_beneath, walk_beneath
from actstore.query.server.catalog.served_files import ServedFiles
from actstore.storage.blobs import BlobNotFoundError
from actstore.storage.local import LocalBlobs
from tests.query.running import Running, running
from tests.query.server.admission.test_access import Reply, ask
from tests.query.stores import COMPRESSED, GROWN, KEPT, WHOLE
from tests.store.example import HOOKS

HOOK: Final = HOOKS[0]
SECRET: Final = "secret-of-somebody-else"
Open = Callable[..., int]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with links of every kind, beside one with a secret."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text(SECRET)
    (tmp_path / "outside2").symlink_to(tmp_path / "outside")
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_text("inside")
    os.mkfifo(root / "pipe")
    for name, target in {
        "relative": "a/b/file",
        "folder": "a/b",
        "climbing": "a/../a/b/../b/file",
        "chain": "relative",
        "absolute": str(root / "a" / "b" / "file"),
        "dangling": "a/nothing",
        "loop": "loop",
        "out": str(tmp_path / "outside" / "file"),
        "out-folder": str(tmp_path / "outside"),
        "out-relative": "../outside/file",
        "out-chain": "out",
        "out-from-inside": "folder/out",
        "out-alike": str(tmp_path / "outside2" / "file"),
        "magic": f"/proc/self/root{tmp_path}/outside/file",
        "to-pipe": "pipe",
    }.items():
        (root / name).symlink_to(target)
    (root / "a" / "b" / "out").symlink_to("../../../outside/file")
    return root


@pytest.fixture(params=[open_beneath, walk_beneath], ids=["call", "walk"])
def opens(request: pytest.FixtureRequest) -> Open:
    open_function: Open = request.param
    return open_function


def text_of(opens: Open, root: Path, path: str, *allowed: Path) -> str | int:
    """Text of a file, or the number of the error."""
    folder = os.open(root, os.O_RDONLY)
    try:
        descriptor = opens(folder, path, FILE, allowed)
        try:
            return os.read(descriptor, 1000).decode()
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.errno or 0
    finally:
        os.close(folder)


@pytest.mark.parametrize(
    "path", ["a/b/file", "relative", "folder/file", "climbing", "chain", "a/../a/b/file", "folder/../b/file"]
)
def test_what_is_inside(path: str, opens: Open, tree: Path) -> None:
    assert text_of(opens, tree, path) == "inside"


@pytest.mark.parametrize(
    "path",
    [
        "out",
        "out-folder/file",
        "out-relative",
        "out-chain",
        "out-from-inside",
        "folder/out",
        "magic",
        "../outside/file",
        "a/../../outside/file",
        "/etc/passwd",
    ],
)
def test_what_is_outside(path: str, opens: Open, tree: Path) -> None:
    text = text_of(opens, tree, path)
    assert text in (errno.EXDEV, errno.ENOENT)
    assert (text == errno.EXDEV) or path == "/etc/passwd"
    folder = os.open(tree, os.O_RDONLY)
    for flags in (PATH_ONLY, FOLDER):
        with pytest.raises(OSError, match="link|No such file"):
            opens(folder, path, flags)
    os.close(folder)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("dangling", errno.ENOENT),
        ("loop", errno.ELOOP),
        ("nothing", errno.ENOENT),
        ("a/b/file/c", errno.ENOTDIR),
    ],
)
def test_what_is_not_there(path: str, number: int, opens: Open, tree: Path) -> None:
    assert text_of(opens, tree, path) == number


def test_folders_that_are_allowed(opens: Open, tree: Path) -> None:
    outside = tree.parent / "outside"
    for path in ("out", "out-folder/file", "out-chain"):
        assert text_of(opens, tree, path, outside) == SECRET
    # Neither by another name, nor from there to elsewhere.
    for path in ("out-alike", "out-relative", "magic"):
        assert text_of(opens, tree, path, outside) == errno.EXDEV
    assert text_of(opens, tree, "absolute", tree) == "inside"
    (outside / "on").symlink_to("../root/a/b/file")
    assert text_of(opens, tree, "out-folder/on", outside) == errno.EXDEV
    (tree / "over").symlink_to(f"{outside}/../root/a/b/file")
    assert text_of(opens, tree, "over", outside) == errno.EXDEV


def test_descriptors_are_given_back(opens: Open, tree: Path) -> None:
    def n_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = n_open()
    for path in ("relative", "out", "loop", "dangling", "absolute", "out-folder/file", "a/b/file/c"):
        text_of(opens, tree, path)
        text_of(opens, tree, path, tree, tree.parent / "outside")
    assert n_open() == before


def test_a_link_that_changes_meanwhile(opens: Open, tree: Path) -> None:
    """A server that first checks and then opens would give the secret now and then."""
    is_over = threading.Event()

    def change() -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            target = "a/b/file" if number % 2 else "../outside/file"
            (tree / f"new{number % 2}").symlink_to(target)
            (tree / f"new{number % 2}").rename(tree / "moving")

    (tree / "moving").symlink_to("a/b/file")
    thread = threading.Thread(target=change)
    thread.start()
    try:
        texts = {text_of(opens, tree, "moving") for _ in range(3000)}
    finally:
        is_over.set()
        thread.join()
    assert texts <= {"inside", errno.EXDEV, errno.EAGAIN, errno.ELOOP, errno.ENOENT}
    assert "inside" in texts


@pytest.mark.parametrize("path", ["pipe", "to-pipe"])
def test_pipes_and_others_are_no_files(path: str, tree: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as bound:
        os.chdir(tree)
        bound.bind("socket")
    for blobs in (ServedFiles(tree), LocalBlobs(tree)):
        for name in (path, "socket", "a"):
            assert blobs.head(name) is None
            with pytest.raises(StorageError):
                blobs.read(name)


def test_served_files_are_local_blobs(tree: Path) -> None:
    ours, all_of_it = ServedFiles(tree), LocalBlobs(tree)
    assert ours.url == all_of_it.url
    for prefix in ("", "a", "a/b", "a/b/file", "folder", "nothing"):
        assert ours.names(prefix) == all_of_it.names(prefix)
    (tree / "plain" / "empty").mkdir(parents=True)
    (tree / "plain" / "file").write_text("six...")
    assert ours.sizes("plain") == all_of_it.sizes("plain") == {"file": 6}
    for key in ("a/b/file", "relative", "absolute"):
        assert bytes(ours.read(key)) == b"inside"
        assert ours.head(key) == all_of_it.head(key)
    for act in (ours.read, ours.head, ours.at("a/b").read):
        with pytest.raises(StorageError, match="a link leads out of .* --allow-links"):
            act("out")
    with pytest.raises(BlobNotFoundError):
        ours.read("nothing")
    # Each store below the root is separate.
    (tree / "a" / "other").write_text("of a neighbour")
    (tree / "a" / "b" / "neighbour").symlink_to("../other")
    assert bytes(ours.read("a/b/neighbour")) == b"of a neighbour"
    with pytest.raises(StorageError, match="a link leads out of .*a/b, "):
        ours.at("a").at("b").read("neighbour")


def linked(store: Path, key: str, target: Path) -> None:
    """Put a link in the place of a file or folder, to a moved copy or to something else."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(store / key, target)
    else:
        (store / key).unlink()
    (store / key).symlink_to(target)


RECORDS: Final = {
    "manifest": (WHOLE, "_actstore/manifest.json"),
    "table": (WHOLE, "_actstore/runs/0000/shards.parquet"),
    "sums": (WHOLE, "_actstore/runs/0000/statistics.json"),
    "plan": (GROWN, "_actstore/runs/0000/plan.json"),
    "commit": (GROWN, "_actstore/runs/0001/commits/00000000.json"),
    "tokens-record": (GROWN, "_actstore/runs/0000/tokens.json"),
    "columns": (KEPT, "_actstore/runs/0000/columns/00000001.parquet"),
    "metadata": (WHOLE, f"acts/{HOOK}/zarr.json"),
    "root-metadata": (WHOLE, "zarr.json"),
    "shard": (WHOLE, f"acts/{HOOK}/c.0.0.0"),
    "compressed": (COMPRESSED, f"acts/{HOOK}/c.0.0.0"),
    "tokens": (WHOLE, "tokens/c.0.0"),
    "folder": (WHOLE, "acts"),
    "hook": (WHOLE, f"acts/{HOOK}"),
    "runs": (GROWN, "_actstore/runs"),
}
"""Stores, and the file or folder of each that is a link."""


@pytest.fixture(scope="module")
def root(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stores; one file or folder of each is elsewhere, and the link in its place leads to a secret."""
    above = tmp_path_factory.mktemp("linked")
    folder = above / "root"
    secret = above / "secret"
    secret.write_text(SECRET * 1000)
    for name, (kind, key) in RECORDS.items():
        shutil.copytree(stores / kind, folder / f"moved-{name}")
        linked(folder / f"moved-{name}", key, above / "moved" / name)
        if (stores / kind / key).is_file():
            for how, target in (("secret", secret), ("pipe", folder / "pipe")):
                shutil.copytree(stores / kind, folder / f"{how}-{name}")
                place = folder / f"{how}-{name}" / key
                place.unlink()
                if how == "pipe":
                    os.mkfifo(place)
                else:
                    place.symlink_to(target)
    shutil.copytree(stores / WHOLE, folder / "within")
    shutil.move(folder / "within" / "acts", folder / "within" / "elsewhere")
    (folder / "within" / "acts").symlink_to("elsewhere")
    shutil.copytree(stores / WHOLE, above / "other" / "beside")
    (folder / "beside").symlink_to(above / "other" / "beside")
    (folder / "below").mkdir()
    (folder / "below" / "latest").symlink_to("../within")
    (folder / "named-by-a-link").symlink_to(stores / WHOLE)
    return folder


@pytest.fixture(scope="module")
def served(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    named = f"named={root / 'named-by-a-link'}"
    with running(tmp_path_factory.mktemp("server"), "--root", str(root), named, "--timeout", "10") as server:
        yield server


def replies(server: Running, name: str) -> Iterator[Reply]:
    """Replies to all requests that read a file of a store."""
    url = f"/v1/stores/{name}"
    _, key = RECORDS[name.partition("-")[2]]
    kept = [key_below for _, key_below in RECORDS.values()]
    for path in (
        "",
        "/hooks",
        f"/hooks/{HOOK}/stats",
        f"/hooks/{HOOK}/slice?seq=0:16",
        f"/hooks/{HOOK}/slice?seq=1,3&pos=2",
        "/hooks/tokens/slice?seq=0:3",
        "/prompts?tokens=9",
        f"/batches/0?hook={HOOK}&batch_size=64&shuffle=window&window_rows=64",
        f"/batches/0?hook={HOOK}&batch_size=64",
        f"/batches/0?hook={HOOK}&batch_size=64&provenance=true",
        *(f"/zarr/{key_below}" for key_below in dict.fromkeys((key, *kept))),
    ):
        yield ask(server.url, f"{url}{path}")
    yield ask(server.url, f"{url}/zarr/{key}", method="HEAD")
    body = json.dumps({"hooks": [HOOK, "tokens"], "sequences": "0:4"})
    try:
        yield ask(server.url, f"{url}/select", method="POST", body=body)
    except http.client.IncompleteRead as error:
        yield Reply(200, (), error.partial)  # the reply has begun when the second array cannot be read


@pytest.mark.parametrize("how", ["secret", "moved", "pipe"])
@pytest.mark.parametrize("name", RECORDS)
def test_no_reply_has_what_a_link_leads_to(how: str, name: str, served: Running, root: Path) -> None:
    if not (root / f"{how}-{name}").exists():
        pytest.skip("a folder is only moved")
    received = list(replies(served, f"{how}-{name}"))
    text = "".join(reply.text for reply in received)
    has_secret = SECRET in text  # not asserted directly, as a difference would take minutes to print
    assert not has_secret
    assert {reply.status for reply in received} <= {200, 206, 403, 404, 409, 422, 502}
    assert {reply.status for reply in received} & {404, 502}
    if how != "pipe":
        assert "--allow-links" in text or "there is no store" in text


def test_links_that_stay(served: Running, stores: Path) -> None:
    expected = actstore.open(stores / WHOLE)[HOOK].numpy(slice(None))
    for name in ("within", "named"):
        store = served.store(name, direct=False)
        assert store[HOOK].numpy(slice(None)).tobytes() == expected.tobytes()
        with store.loader(HOOK, batch_size=64, shuffle="window", window_rows=64) as loader:
            assert loader.batch(0).shape[0] == 64


def test_folders_linked_into_the_root(served: Running) -> None:
    listed = ask(served.url, "/v1/stores")
    names = [store["name"] for store in json.loads(listed.body)["stores"]]
    assert "latest" in names
    assert "beside" not in names
    assert "named-by-a-link" not in names
    assert ask(served.url, "/v1/stores/beside").status == 404
    log = served.log.read_text()
    assert log.count("/beside is not looked into") == 2  # before the start, and by the server


def test_folders_that_links_may_lead_to(
    root: Path, stores: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The activations of the store are on another disk."""
    expected = actstore.open(stores / WHOLE)[HOOK].numpy(slice(None))
    allowed = str(root.parent / "moved")
    arguments = ("--root", str(root), "--allow-links", allowed)
    with running(tmp_path_factory.mktemp("allowing"), *arguments) as server:
        for name in ("folder", "hook", "shard", "manifest"):
            store = server.store(f"moved-{name}", direct=False)
            assert store[HOOK].numpy(slice(None)).tobytes() == expected.tobytes()
            with store.loader(HOOK, batch_size=64) as loader:
                assert loader.batch(0).shape[0] == 64
        refused = ask(server.url, "/v1/stores/secret-shard/zarr/" + RECORDS["shard"][1])
        assert refused.status == 502
        assert SECRET not in refused.text


def test_a_store_that_is_named_and_leads_out(root: Path, stores: Path, tmp_path: Path) -> None:
    from actstore.cli.main import run

    shutil.copytree(stores / WHOLE, tmp_path / "store")
    linked(tmp_path / "store", "_actstore", tmp_path / "elsewhere")
    assert run(["serve", str(tmp_path / "store"), "--port", "0"]) == 1
    del root
    with suppress(StorageError):
        assert not isinstance(actstore.open(tmp_path / "store"), ServedStore)
