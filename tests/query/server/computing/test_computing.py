"""A server that computes what a store lacks: the same bits as here, its limits, and clients that ask for too much."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import torch

import actstore
from actstore.demo import MODEL_PATH
from actstore.errors import HookError, JobError, PlanMismatchError, StorageError, TokensError
from tests.query.running import Running, running

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_pattern", "blocks.2.hook_resid_post"]
KNOWN = ["My lord, I came", "to see"]
Reply = tuple[int, dict[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def model() -> actstore.HookedModel:
    return actstore.HookedModel.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def begun(model: actstore.HookedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two prompts, begun with a model in memory."""
    folder = tmp_path_factory.mktemp("begun") / "store"
    actstore.activations(model, KNOWN, HOOKS, folder)
    return folder


@pytest.fixture(scope="module")
def served(
    model: actstore.HookedModel, begun: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server of ``store``; of ``other``, of another model; and of ``full``, which is as large as stores may be."""
    folder = tmp_path_factory.mktemp("stores")
    shutil.copytree(begun, folder / "store")
    changed = actstore.HookedModel.from_pretrained(MODEL_PATH)
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1.0
    actstore.activations(changed, KNOWN, HOOKS, folder / "other")
    arguments = ["--compute", str(MODEL_PATH), "--compute-tokens", "400", "--compute-pending", "4"]
    with running(tmp_path_factory.mktemp("log"), "--root", str(folder), *arguments) as server:
        yield server


def post(server: Running, body: Any, store: str = "store") -> Reply:
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=120)
    try:
        connection.request(
            "POST",
            f"/v1/stores/{store}/activations",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), json.loads(reply.read())
    finally:
        connection.close()


def test_the_same_bits_as_here(model: actstore.HookedModel, served: Running, tmp_path: Path) -> None:
    """Prompts that the store has and lacks, in any order, twice over; then nothing is computed again."""
    prompts = ["father's funeral", *KNOWN, "I prithee do not mock me", "to see"]
    here = tmp_path / "here"
    actstore.activations(model, KNOWN, HOOKS, here)
    wanted = actstore.activations(model, prompts, HOOKS, here)
    url = f"{served.url}/v1/stores/store"
    for _ in range(2):
        found = actstore.activations(None, prompts, HOOKS, url)
        assert set(found) == set(HOOKS)
        for hook in HOOKS:
            assert found[hook].shape == wanted[hook].shape
            for number, text in enumerate(prompts):
                length = model.to_tokens(text).shape[1]
                index = (
                    (number, slice(0, length))
                    if "resid" in hook
                    else (number, ..., slice(0, length), slice(0, length))
                )
                assert torch.equal(
                    found[hook][index].view(torch.int32), wanted[hook][index].view(torch.int32)
                )
    assert served.store("store").shape[0] == 4
    ids = [model.to_tokens(text)[0].tolist() for text in prompts]
    again = served.store("store").activations(ids, ("resid_post", 2))
    assert torch.equal(again["resid_post", 2], found["resid_post", 2])
    assert served.store("store").shape[0] == 4


def test_what_comes_over_http_alone(model: actstore.HookedModel, served: Running) -> None:
    """The reply says where the values are, and any client can read them there."""
    ids = [[5, 6, 7, 8], [9, 10]]
    status, _, document = post(served, {"hooks": [HOOKS[0]], "tokens": ids})
    assert status == 200
    assert document["lengths"] == [4, 2]
    (place,) = document["places"]
    assert place["hooks"] == [HOOKS[0]]
    store = served.store("store")
    assert [store.tokens[row, :2].tolist() for row in place["sequences"]] == [[5, 6], [9, 10]]
    _, cache = model.run_with_cache(torch.tensor(ids[:1]))
    row = store[HOOKS[0]][place["sequences"][0], :4]
    torch.testing.assert_close(row, cache[HOOKS[0]][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "hooks", "store", "error", "message"),
    [
        pytest.param(
            [[5] * 65],
            HOOKS[0],
            "store",
            TokensError,
            "has 65 tokens, and sequences of the store store have room",
            id="long",
        ),
        pytest.param(
            [[5] * 401],
            HOOKS[0],
            "store",
            TokensError,
            "have 401 tokens, and 400 are the most at once",
            id="many",
        ),
        pytest.param(
            ["word " * 500], HOOKS[0], "store", TokensError, "tokens, and 400 are the most at once", id="text"
        ),
        pytest.param([[5, 6]], "blocks.9.hook_resid_post", "store", HookError, "hook_resid_post", id="hook"),
        pytest.param([[5, 10_000_000]], HOOKS[0], "store", TokensError, "10000000|10,000,000", id="id"),
        pytest.param(
            [[5, 6]],
            HOOKS[0],
            "other",
            PlanMismatchError,
            "the store other holds activations of .* fingerprint",
            id="model",
        ),
        pytest.param(
            [[5, -6]], HOOKS[0], "store", TokensError, "prompt 0 has the token id -6", id="negative"
        ),
        pytest.param([], HOOKS[0], "store", TokensError, "without any prompt", id="none"),
    ],
)
def test_what_cannot_be_computed_is_one_sentence(
    served: Running, tokens: Any, hooks: Any, store: str, error: type[Exception], message: str
) -> None:
    opened = served.store(store)
    before = opened.shape
    with pytest.raises(error, match=message) as info:
        opened.activations(tokens, hooks)
    text = str(info.value.args[0])
    assert text.count(". ") == 0
    assert "/tmp" not in text
    assert served.store(store).shape == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"hooks": HOOKS, "tokens": [[5, -6]]}, "tokens.0.1: Input should be greater than or equal to 0"),
        ({"hooks": HOOKS, "tokens": [[]]}, "tokens.0: List should have at least 1 item"),
        ({"hooks": HOOKS}, "give either texts or tokens"),
        ({"hooks": HOOKS, "tokens": [[5]], "texts": ["to"]}, "give either texts or tokens"),
        ({"hooks": [], "tokens": [[5]]}, "hooks: List should have at least 1 item"),
    ],
)
def test_bodies_that_are_not_valid(served: Running, body: Any, message: str) -> None:
    status, _, document = post(served, body)
    assert status == 422
    assert message in document["detail"]


def test_options_that_the_server_decides_are_refused(
    model: actstore.HookedModel, served: Running, tmp_path: Path
) -> None:
    url = f"{served.url}/v1/stores/store"
    with pytest.raises(JobError, match="model was given, and http.* is of a server"):
        actstore.activations(model, KNOWN, HOOKS, url)
    with pytest.raises(JobError, match="batch_size was given"):
        actstore.activations(None, KNOWN, HOOKS, url, batch_size=4)
    with pytest.raises(JobError, match="model is None, and .* is no store of a server"):
        actstore.activations(None, KNOWN, HOOKS, tmp_path / "here")


def model_process(server: Running) -> psutil.Process:
    """The process with the model; it is there once something was computed."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if "spawn_main" in " ".join(child.cmdline()))


def _whole(connection: socket.socket) -> str:
    """Head and body of a reply, which can come one after the other."""
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    head = "".join(f"{name}: {value}\r\n" for name, value in reply.getheaders())
    return f"HTTP/1.1 {reply.status} {reply.reason}\r\n{head}\r\n{reply.read().decode()}"


def test_a_full_queue_a_client_that_leaves_and_a_model_that_is_killed(served: Running) -> None:
    """The process with the model is stopped for as long as the queue is filled, and killed in the end."""
    assert post(served, {"hooks": HOOKS[:1], "tokens": [[3, 4]]})[0] == 200
    process = model_process(served)
    process.suspend()
    where = urlsplit(served.url)
    waiting = []
    try:
        for number in range(4):  # one is computed, two more of this client may wait, one is too many
            body = json.dumps({"hooks": HOOKS[:1], "tokens": [[3, 4, 5 + number]]}).encode()
            connection = socket.create_connection((where.hostname, where.port), timeout=120)
            connection.sendall(
                b"POST /v1/stores/store/activations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            waiting.append(connection)
            if number < 3:
                connection.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
        waiting[3].settimeout(60)
        refused = _whole(waiting[3])
        assert refused.startswith("HTTP/1.1 429 ")
        assert "\r\nretry-after: " in refused.lower()
        assert "2 computations of this client wait for their turn" in refused
        assert served.store("store").shape[1] == 64  # reading goes on
        waiting[1].close()  # its request gives way to another
        deadline = time.monotonic() + 60
        while True:
            with ThreadPoolExecutor(1) as thread:
                asked = thread.submit(post, served, {"hooks": HOOKS[:1], "tokens": [[3, 4, 99]]})
                time.sleep(0.2)
                if not asked.done() or time.monotonic() > deadline:
                    process.kill()
                    status, _, document = asked.result()
                    break
        first = waiting[0].makefile("rb").readline()
        assert first.startswith(b"HTTP/1.1 503 ")
        assert status in (200, 503), document
    finally:
        # A process that stays stopped would outlive its server, and keep the pipe of the log open.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        for connection in waiting:
            connection.close()
    status, _, document = post(served, {"hooks": HOOKS[:1], "tokens": [[3, 4, 99]]})
    assert status == 200, document
    assert document["lengths"] == [3]


def test_a_server_that_only_reads_says_so(begun: Path, tmp_path: Path) -> None:
    with running(tmp_path, f"store={begun}") as server:
        status, _, document = post(server, {"hooks": HOOKS, "texts": KNOWN})
        assert status == 422
        assert "this server only reads; ask whoever runs it to start it with --compute" in document["detail"]
        with pytest.raises(JobError, match="this server only reads"):
            actstore.activations(None, KNOWN, HOOKS, f"{server.url}/v1/stores/store")
    assert actstore.open(str(begun)).shape[0] == 2


def test_a_store_grows_to_its_limit_and_ends_with_its_server(
    begun: Path, tmp_path: Path, model: actstore.HookedModel
) -> None:
    shutil.copytree(begun, tmp_path / "store")
    nbytes = sum(4 * array.numel() for array in actstore.open(str(begun)).cache([0, 1]).values())
    arguments = ["--compute", str(MODEL_PATH), "--compute-limit", str(nbytes + 40_000)]
    with running(tmp_path, f"store={tmp_path / 'store'}", *arguments) as server:
        store = server.store("store")
        store.activations([[3, 4]], HOOKS[0])  # 64 positions of 128 float32
        with pytest.raises(
            TokensError, match="GB more, and .* GB are the most; ask for fewer prompts or hooks"
        ):
            store.activations([[3, 5]], HOOKS[0])
        store.activations([[3, 4]], HOOKS[0])
        process = model_process(server)
        os.kill(server.process.pid, signal.SIGKILL)
        process.wait(60)
    assert actstore.verify(str(tmp_path / "store")).findings == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compute", "no/such/folder/at-all"], "no/such/folder"),
        (["--compute", str(MODEL_PATH), "--workers", "2"], "--compute has one process with the model"),
    ],
)
def test_a_server_that_cannot_compute_does_not_start(
    begun: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    with (
        pytest.raises(AssertionError, match="did not start") as info,
        running(tmp_path, f"store={begun}", *arguments),
    ):
        pass
    assert message in str(info.value)


def test_a_store_begun_with_a_folder(tmp_path: Path) -> None:
    actstore.activations(MODEL_PATH, KNOWN, HOOKS, tmp_path / "store")
    with running(tmp_path, f"store={tmp_path / 'store'}", "--compute", str(MODEL_PATH)) as server:
        found = actstore.activations(None, ["mock me"], HOOKS, f"{server.url}/v1/stores/store")
    wanted = actstore.activations(MODEL_PATH, ["mock me"], HOOKS, tmp_path / "store")
    assert all(torch.equal(found[hook], wanted[hook]) for hook in HOOKS)
    with pytest.raises(StorageError):
        actstore.activations(None, ["mock me"], HOOKS, f"{server.url}/v1/stores/store")
