"""Replies of many bytes: ranges, ETags, and errors for bytes that are gone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actstore.query.server.catalog import catalog
from actstore.query.wire import CONTENTS, SHAPE
from actstore.storage.local import LocalBlobs
from actstore.store.records.seal import seal
from tests.query.in_process import App
from tests.store.example import HOOKS, example_plan, example_values, write_store

A = HOOKS[0]
SLICE = f"one/hooks/{A}/slice?seq=3:9"
BATCHES = f"one/batches/{{}}?hook={A}&batch_size=16"


def write(folder: Path, shift: int = 0) -> Any:
    """Write a sealed store; its plan is the same however its rows are shifted."""
    blobs, plan = LocalBlobs(folder), example_plan()
    values = {name: np.roll(array, shift, axis=0) for name, array in example_values(plan).items()}
    write_store(blobs, plan, values, range(plan.n_segments))
    seal(blobs)
    return values[A]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> tuple[App, Any]:
    """A server of one store, and the values of its first hook."""
    folder = tmp_path_factory.mktemp("replies") / "one"
    array = write(folder)
    return App(stores={"one": str(folder)}), array


@pytest.fixture
def app(values: tuple[App, Any]) -> App:
    return values[0]


@pytest.fixture
def data(values: tuple[App, Any]) -> bytes:
    """All bytes of the slice."""
    return np.ascontiguousarray(values[1][3:9]).tobytes()


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=5-63", slice(5, 64)),
        ("bytes=5-", slice(5, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=3064-9999", slice(3064, None)),
    ],
)
def test_ranges(app: App, data: bytes, asked: str, part: slice) -> None:
    reply = app.ask(SLICE, Range=asked)
    assert reply.status_code == 206
    assert reply.content == data[part]
    first, end, _ = part.indices(len(data))
    assert reply.headers["content-range"] == f"bytes {first}-{end - 1}/{len(data)}"


def test_a_range_is_of_the_content_that_was_begun_with(app: App, data: bytes) -> None:
    """A client with the first part of other bytes gets all of these, and not their second part."""
    tag = app.ask(SLICE).headers["etag"]
    assert app.ask(SLICE, Range="bytes=8-15", If_Range=tag).content == data[8:16]
    other = app.ask(SLICE, Range="bytes=8-15", If_Range='"0123456789abcdef0123456789abcdef"')
    assert (other.status_code, other.content) == (200, data)


def test_every_content_has_a_tag_of_its_own(app: App, tmp_path: Path) -> None:
    """Slices, formats, batches, and stores of the same plan have different tags. A client keeps what is still valid."""
    forms = ("raw", "safetensors", "npy", "arrow", "json")
    paths = [f"{SLICE}&format={form}" for form in forms]
    paths += [
        SLICE.replace("3:9", "4:9"),
        *(BATCHES.format(k) for k in range(3)),
        f"{BATCHES.format(0)}&epoch=1",
    ]
    replies = {path: app.ask(path) for path in paths}
    tags = [reply.headers["etag"] for reply in replies.values()]
    assert len({reply.content for reply in replies.values()}) == len(set(tags)) == len(paths)
    for path, tag in zip(paths, tags, strict=True):
        assert app.ask(path, If_None_Match=tag).status_code == 304
        assert app.ask(path, If_None_Match=tags[paths.index(path) - 1]).status_code == 200
    write(tmp_path / "one", shift=1)
    other = App(stores={"one": str(tmp_path / "one")})
    for path, tag in zip(paths, tags, strict=True):
        reply = other.ask(path, If_None_Match=tag)
        assert reply.status_code == 200
        assert reply.content != replies[path].content


def test_a_shard_that_is_gone_is_not_called_absent(tmp_path: Path) -> None:
    """A Zarr reader takes "not found" for rows of fill values."""
    write(tmp_path / "one")
    app = App(stores={"one": str(tmp_path / "one")})
    key = f"one/zarr/acts/{A}/c.{{}}.0.0"
    (tmp_path / f"one/acts/{A}/c.1.0.0").unlink()
    for method in ("GET", "HEAD"):
        assert app.ask(key.format(0), method=method).status_code == 200
        assert app.ask(key.format(1), method=method).status_code == 502
    assert "committed but missing; the store is damaged" in app.ask(key.format(1)).json()["detail"]
    assert app.ask("one/zarr/acts/none/zarr.json").status_code == 404


def test_nothing_is_told_without_a_token(tmp_path: Path) -> None:
    write(tmp_path / "one")
    (tmp_path / "tokens").write_text("a-token-of-enough-characters one\n")
    app = App(stores={"one": str(tmp_path / "one")}, token_file=tmp_path / "tokens")
    for path in ("one", SLICE, "one/zarr/zarr.json", "none/zarr/zarr.json"):
        for method in ("GET", "HEAD", "POST", "OPTIONS"):
            assert app.ask(path, method=method).status_code == 401
    good = {"Authorization": "Bearer a-token-of-enough-characters"}
    assert app.ask(SLICE, **good).status_code == 200


@pytest.mark.parametrize(
    ("seq", "pos", "inner"),
    [
        ("-1", ":", None),
        ("-3,0,-1", "-2:", None),
        ("5:2:-1", "7,0", None),
        ("::9", "::-3", "::5"),
        ("36", "0", "-1"),
        ("9:9", ":", None),
    ],
)
def test_slices_are_those_of_python(values: tuple[App, Any], seq: str, pos: str, inner: str | None) -> None:
    def axis(text: str) -> Any:
        if ":" in text:
            return slice(*(int(part) if part else None for part in text.split(":")))
        return [int(part) for part in text.split(",")]

    app, stored = values
    asked = f"one/hooks/{A}/slice?seq={seq}&pos={pos}" + ("" if inner is None else f"&inner={inner}")
    expected = stored[axis(seq)][:, axis(pos)][:, :, axis(inner or ":")]
    reply = app.ask(asked)
    assert reply.status_code == 200, reply.text
    assert reply.headers[SHAPE] == ",".join(map(str, expected.shape))
    assert reply.content == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("seq=x", "seq: it must be a slice (0:8), a number (-1) or a list of numbers (3,17); /docs"),
        ("pos=1,:", "pos: it must be a slice (0:8), a number (-1) or a list of numbers (3,17); /docs"),
        (
            "inner=1;2",
            "inner: it must be a slice (0:64) or a number for each axis, joined by commas (3,0:64)",
        ),
    ],
)
def test_what_is_no_slice_is_told_what_one_is(values: tuple[App, Any], query: str, words: str) -> None:
    reply = values[0].ask(f"one/hooks/{A}/slice?{query}")
    assert reply.status_code == 422
    assert reply.json()["detail"].startswith(words)


def test_a_store_that_is_replaced_is_served_as_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The label of its contents changes, by which clients notice."""
    monkeypatch.setattr(catalog, "_LOOK_S", 0.0)
    first, second = write(tmp_path / "one"), write(tmp_path / "two", shift=1)
    app = App(stores={"one": str(tmp_path / "one")})
    replies = [app.ask(SLICE)]
    (tmp_path / "one").rename(tmp_path / "aside")
    (tmp_path / "two").rename(tmp_path / "one")
    replies.append(app.ask(SLICE))
    assert [reply.content for reply in replies] == [first[3:9].tobytes(), second[3:9].tobytes()]
    assert len({reply.headers[CONTENTS] for reply in replies}) == 2
