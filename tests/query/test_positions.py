"""Stores of every kind of positions over HTTP: the arrays of a local store, and few requests for scattered rows."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

import actstore
from actstore.query.wire import RAW
from tests.query.running import Running, running
from tests.tokens.chats.shapes import LLAMA

HOOK, HEADS = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"
KINDS = {
    "all": "all",
    "last": "last",
    "last-two": "last:2",
    "span": "1:6",
    "every": "every:9",
    "sample": "sample:4",
    "role": "role:assistant",
    "role-last": "role:user:last",
    "after": "after:Hi",
    "column": "column:spots",
}
CHATS: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Ho!"}],
        "spots": [3, 0, -1],
    },
    {"messages": [{"role": "user", "content": "Who?"}], "spots": None},
    {
        "messages": [
            {"role": "system", "content": "Hi"},
            {"role": "user", "content": "Speak, then"},
            {"role": "assistant", "content": "Nay, answer me"},
        ],
        "spots": [7],
    },
]


TEXTS = ["Hi there, who? Hi, my lord", "No", "Say Hi again"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("positions")
    (folder / "template.jinja").write_text(LLAMA, encoding="utf-8")
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    chats = {"tokens": str(folder / "chats.jsonl"), "chat_template": str(folder / "template.jinja")}
    texts = {"tokens": str(folder / "texts.jsonl"), "packing": "document"}
    for name, positions in KINDS.items():
        source: dict[str, Any] = texts if name == "after" else chats
        actstore.extract(
            model=str(tiny_model("llama", max_position_embeddings=512)),
            **source,
            hooks=[HOOK, HEADS],
            positions=positions,
            out=str(folder / "stores" / name),
        )
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    with running(folder, "--root", str(folder / "stores")) as server:
        yield server


@pytest.fixture
def arrays(folder: Path, name: str) -> dict[str, NDArray[Any]]:
    """All arrays of the store, as zarr-python reads the files."""
    group = actstore.open(str(folder / "stores" / name)).zarr
    found = {path: np.asarray(group[f"acts/{path}"]) for path in (HOOK, HEADS)}
    own = ("tokens", "lengths", "documents", "offsets", "roles", "turns", "positions")
    return found | {path: np.asarray(group[path]) for path in own if path in group}


def n_requests(served: Running) -> float:
    """Requests of stores that the server has answered."""
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    totals = [
        line.rpartition(" ")[2]
        for line in lines
        if line.startswith("actstore_requests_total") and "/v1" in line
    ]
    return sum(map(float, totals))


@pytest.mark.parametrize("name", KINDS)
def test_arrays_and_rows_are_those_of_the_files(
    served: Running, name: str, arrays: dict[str, NDArray[Any]]
) -> None:
    store = served.store(name, direct=False)
    for path, values in arrays.items():
        if path in (HOOK, HEADS):
            np.testing.assert_array_equal(store[path][:].numpy(), values)
        else:
            np.testing.assert_array_equal(getattr(store, path)[:], values)
    lengths = arrays["lengths"].tolist()
    if name == "all":
        places = [(i, p, p) for i, n in enumerate(lengths) for p in range(n)]
    else:
        slots = arrays["positions"]
        places = [(int(i), int(slots[i, s]), int(s)) for i, s in np.argwhere(slots >= 0)]
    order = np.random.default_rng(0).permutation(len(places))
    sequences, positions, entries = np.array(places)[order].T
    for hook in (HOOK, HEADS):
        given = store[hook].at(sequences, positions).numpy()
        np.testing.assert_array_equal(given, arrays[hook][sequences, entries])
        backwards = positions - arrays["lengths"][sequences]
        np.testing.assert_array_equal(store[hook].at(sequences, backwards).numpy(), given)
    there = np.unique(sequences)
    last = [max(e for s, _, e in places if s == sequence) for sequence in there]
    np.testing.assert_array_equal(store[HOOK].last(there.tolist()).numpy(), arrays[HOOK][there, last])
    # So many sequences go into the body of a request.
    many = np.resize(there, 2000)
    np.testing.assert_array_equal(store[HOOK].rows[many.tolist(), 0:1], arrays[HOOK][many, 0:1])
    np.testing.assert_array_equal(store.tokens[many.tolist(), 2:5], arrays["tokens"][many, 2:5])


@pytest.mark.parametrize("name", KINDS)
def test_selections_name_positions_or_slots(
    served: Running, name: str, arrays: dict[str, NDArray[Any]]
) -> None:
    url = f"{served.url}/v1/stores/{name}"
    are_slots = name != "all"
    asked: dict[str, Any] = {"hooks": [HOOK, HEADS, "tokens", "lengths"], "sequences": [2, 0]}
    entries, positions = ([0, -1], [5, 2]) if are_slots else ([5, 2], [5, 2])
    asked["hooks"] += [path for path in ("roles", "positions") if path in arrays]
    if are_slots:
        asked["slots"] = entries
    asked["positions"] = positions
    reply = httpx.post(f"{url}/select", json=asked)
    assert reply.status_code == 200, reply.text
    tensors = safetensors.numpy.load(reply.content)
    assert sorted(tensors) == sorted(asked["hooks"])
    for path, values in tensors.items():
        of_slots = path in (HOOK, HEADS, "positions")
        whole = arrays[path][[2, 0]]
        expected = whole if path == "lengths" else whole[:, entries if of_slots else positions]
        np.testing.assert_array_equal(values, expected)
    # Where the bytes lie, for those who read them by themselves.
    plan = httpx.post(f"{url}/plan", json={"select": asked}).json()
    assert {array["name"]: tuple(array["shape"]) for array in plan["arrays"]} == {
        path: values.shape for path, values in tensors.items()
    }
    wrong = {"hooks": [HOOK], ("positions" if are_slots else "slots"): "0:1"}
    for resource, body in (("select", wrong), ("plan", {"select": wrong})):
        refused = httpx.post(f"{url}/{resource}", json=body)
        assert refused.status_code == 422
        assert ("choose slots" if are_slots else "choose positions") in refused.json()["detail"]


@pytest.mark.parametrize("name", ["all", "role", "column"])
def test_scattered_rows_take_few_requests(
    served: Running, name: str, arrays: dict[str, NDArray[Any]]
) -> None:
    store = served.store(name, direct=False)
    if name == "all":
        sequences, positions = np.nonzero(np.arange(arrays["tokens"].shape[1]) < arrays["lengths"][:, None])
        entries = positions
    else:
        sequences, entries = np.nonzero(arrays["positions"] >= 0)
        positions = arrays["positions"][sequences, entries]
    assert len(set(entries.tolist())) > 1
    acts = store[HOOK]
    before = n_requests(served)
    given = acts.at(sequences, positions)
    # Lengths, positions, and the rows.
    assert 1 <= n_requests(served) - before <= 3
    np.testing.assert_array_equal(given.numpy(), arrays[HOOK][sequences, entries])


@pytest.mark.parametrize("name", ["role"])
def test_rows_by_plain_http(served: Running, name: str, arrays: dict[str, NDArray[Any]]) -> None:
    url = f"{served.url}/v1/stores/{name}/rows"
    reply = httpx.post(url, json={"hook": HOOK, "sequences": [2, 0, 2], "entries": [1, 0, -1]})
    assert (reply.status_code, reply.headers["Content-Type"]) == (200, RAW)
    assert reply.headers["Actstore-Shape"] == f"3,{arrays[HOOK].shape[2]}"
    assert reply.content == arrays[HOOK][[2, 0, 2], [1, 0, -1]].tobytes()
    assert httpx.post(url, json={"hook": HOOK, "sequences": [], "entries": []}).content == b""
    for body, problem in (
        ({"hook": HOOK, "sequences": [0], "entries": [0, 1]}, "there are 1 sequences and 2 entries"),
        ({"hook": HOOK, "sequences": [3], "entries": [0]}, "sequences has 3, which is out of bounds for 3"),
        ({"hook": HOOK, "sequences": [0], "entries": [99]}, "entries has 99, which is out of bounds"),
        ({"hook": "lengths", "sequences": [0], "entries": [0]}, "lengths has one number for each sequence"),
    ):
        refused = httpx.post(url, json=body)
        assert refused.status_code == 422
        assert problem in refused.json()["detail"]
