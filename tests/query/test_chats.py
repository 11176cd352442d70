"""Roles and turns over HTTP, like other arrays of tokens."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

import actstore
from actstore import analysis
from actstore.errors import HookError, LoaderError
from tests.query.running import Running, running

HOOK = "blocks.0.hook_resid_post"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    (folder / "template.jinja").write_text(TEMPLATE)
    chats = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Number {i}"}]
        for i in range(20)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (folder / "text.txt").write_text("Who goes there? " * 50)
    for name, source in (("chats", "chats.jsonl"), ("text", "text.txt")):
        template: dict[str, Any] = (
            {"chat_template": str(folder / "template.jinja")} if name == "chats" else {}
        )
        actstore.extract(
            actstore.plan(
                model=str(tiny_model("llama")),
                tokens=str(folder / source),
                hooks=[HOOK],
                context_length=64,
                out=str(folder / name),
                **template,
            )
        )
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    with running(folder, "--root", str(folder)) as server:
        yield server


def test_roles_and_turns_are_read_like_tokens(folder: Path, served: Running) -> None:
    local, remote = actstore.open(str(folder / "chats")), served.store("chats")
    for name in ("roles", "turns"):
        np.testing.assert_array_equal(getattr(remote, name)[:], getattr(local, name)[:])
        raw = httpx.get(f"{served.url}/v1/stores/chats/hooks/{name}/slice?seq=2:4&pos=0:9&format=raw")
        assert raw.headers["Actstore-Dtype"] == {"roles": "int8", "turns": "int32"}[name]
        assert raw.content == getattr(local, name)[2:4, 0:9].tobytes()
        saved = httpx.get(f"{served.url}/v1/stores/chats/hooks/{name}/slice?seq=2:4&format=safetensors")
        np.testing.assert_array_equal(load_safetensors(saved.content)[name], getattr(local, name)[2:4])


def test_a_store_without_chats_says_that_it_has_no_roles(served: Running) -> None:
    with pytest.raises(HookError, match="are no chats, so its tokens have no roles"):
        _ = served.store("text").roles
    reply = httpx.get(f"{served.url}/v1/stores/text/hooks/roles/slice?seq=0&format=json")
    assert (reply.status_code, reply.json()["type"]) == (404, "urn:actstore:problem:hook")


@pytest.mark.parametrize("place", ["local", "remote"])
def test_loaders_leave_out_roles(folder: Path, served: Running, place: str) -> None:
    local = actstore.open(str(folder / "chats"))
    store: Any = local if place == "local" else served.store("chats", direct=False)
    options: dict[str, Any] = {"batch_size": 1000, "provenance": True, "shuffle": None}
    drop = ["template", "user", "pad"]
    batch = next(store.loader(HOOK, drop=drop, **options))
    wanted = np.argwhere(local.roles[:] == 3)
    np.testing.assert_array_equal(
        np.stack([np.asarray(batch.sequences), np.asarray(batch.positions)], 1), wanted
    )
    with pytest.raises(LoaderError, match="drop names 'assistant', and .* holds no chats"):
        actstore.open(str(folder / "text")).loader(HOOK, batch_size=1, drop="assistant")


@pytest.mark.parametrize("place", ["local", "remote"])
def test_analyses_leave_out_roles(folder: Path, served: Running, place: str) -> None:
    local = actstore.open(str(folder / "chats"))
    store: Any = local if place == "local" else served.store("chats", direct=False)
    wanted = local.roles[:] == 3
    top = analysis.top_activations(store, HOOK, [2], k=int(wanted.sum()) + 5, drop=["template", "user"])
    assert top.n_rows == wanted.sum()
    found = {(int(s), int(p)) for s, p in zip(top.sequences[0], top.positions[0], strict=True) if s >= 0}
    assert found == set(map(tuple, np.argwhere(wanted).tolist()))
    with pytest.raises(LoaderError, match="drop names 'assistant', and .* holds no chats"):
        analysis.top_activations(actstore.open(str(folder / "text")), HOOK, [2], drop=["assistant"])
