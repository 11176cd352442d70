"""Stores of chats: tokens, roles and turns as they were built by hand, whatever file the chats are in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

import actstore
from actstore.cli.main import cli
from actstore.errors import HookError, JobError, StorageError, TokensError
from actstore.storage.local import LocalBlobs
from actstore.store.format.shard import crc32c, encode
from actstore.store.records.commit import TokensRecord, tokens_key
from tests.store.runs import bytes_below
from tests.tokens.chats.shapes import LLAMA, llama, text_of, turns_of

CHATS: list[list[dict[str, Any]]] = [
    [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "Who goes there?"},
        {"role": "assistant", "content": "A friend 😀."},
    ],
    [],
    [
        {"role": "user", "content": " Hi"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Bye"},
    ],
    [{"role": "user", "content": "<|eot_id|>"}],
]
NUMBERS = {"system": 1, "user": 2, "assistant": 3}
LENGTH = 256
"""The tiny tokenizer knows no words, so a token is a byte or two."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("chats")
    (folder / "template.jinja").write_text(LLAMA, encoding="utf-8")
    lines = (json.dumps({"id": number, "messages": chat}) + "\n" for number, chat in enumerate(CHATS))
    (folder / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        "model": str(tiny_model("llama", max_position_embeddings=512)),
        "tokens": str(folder / "chats.jsonl"),
        "chat_template": str(folder / "template.jinja"),
        "hooks": ["blocks.0.hook_resid_post"],
        "context_length": LENGTH,
        "out": str(folder / "store"),
    }


@pytest.fixture(scope="module")
def store(job: dict[str, Any]) -> actstore.Store:
    actstore.extract(actstore.plan(**job))
    return actstore.open(job["out"])


def test_tokens_roles_and_turns_are_those_built_by_hand(store: actstore.Store, job: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    chats = [(number, chat) for number, chat in enumerate(CHATS) if chat]
    assert store.shape == (len(chats), LENGTH)
    assert (store.roles.dtype, store.turns.dtype) == ("int8", "int32")
    for row, (number, chat) in enumerate(chats):
        parts = llama(chat)
        encoded = tokenizer(text_of(parts), add_special_tokens=False, return_offsets_mapping=True)
        n = len(encoded["input_ids"])
        assert store.lengths[row] == n
        assert store.tokens[row, :n].tolist() == encoded["input_ids"]
        assert store.tokens[row, 0] == tokenizer.bos_token_id
        assert store.tokens[row, 1] != tokenizer.bos_token_id
        assert store.documents[row].tolist() == [number] * n + [-1] * (LENGTH - n)
        by_character = turns_of(parts)
        # No token of this tokenizer is both of a message and of the template.
        turns = [by_character[start] for start, stop in encoded["offset_mapping"]]
        assert all(
            by_character[stop - 1] == turn
            for (_, stop), turn in zip(encoded["offset_mapping"], turns, strict=True)
        )
        roles = [0 if turn < 0 else NUMBERS[chat[turn]["role"]] for turn in turns]
        assert store.turns[row].tolist() == turns + [-1] * (LENGTH - n)
        assert store.roles[row].tolist() == roles + [-1] * (LENGTH - n)
    assert not actstore.verify(store.url).findings


def test_the_plan_says_how_chats_became_text(store: actstore.Store) -> None:
    chat = store.plan.request.tokens.chat
    assert chat is not None
    assert len(chat.template_sha256) == 64
    assert (chat.add_generation_prompt, chat.tools, chat.arguments) == (False, None, {})
    assert store.plan.request.tokens.packing == "document"
    assert store.plan.request.tokens.begin_batch_token is None


def test_info_says_that_they_are_chats(store: actstore.Store) -> None:
    done = CliRunner().invoke(cli, ["info", store.url])
    (line,) = [line for line in done.output.splitlines() if line.startswith("chats")]
    assert store.plan.request.tokens.chat is not None
    assert line.endswith(
        f"messages with roles and turns; template {store.plan.request.tokens.chat.template_sha256[:12]}"
    )


def test_a_template_can_be_given_as_text(store: actstore.Store, job: dict[str, Any], tmp_path: Path) -> None:
    text = Path(job["chat_template"]).read_text(encoding="utf-8")
    assert "\n" in text or "{%" in text
    # It is the same template, so it is the same plan.
    assert actstore.plan(**job | {"chat_template": text}).is_finished
    assert actstore.plan(**job | {"chat_template": Path(job["chat_template"])}).is_finished
    other = job | {"chat_template": text + "{# other #}", "out": str(tmp_path / "other")}
    chat = actstore.plan(**other).plan.request.tokens.chat
    assert chat is not None
    assert store.plan.request.tokens.chat is not None
    assert chat.template_sha256 != store.plan.request.tokens.chat.template_sha256
    with pytest.raises(
        JobError, match="chat_template has 1,048,582 characters, and 1,048,576 bytes are the most"
    ):
        actstore.plan(**job | {"chat_template": "{{ 1 }}"[:6] + "x" * (1 << 20)})
    with pytest.raises(StorageError, match="chat_template cannot be read"):
        actstore.plan(**job | {"chat_template": "{ no file }"})


@pytest.mark.parametrize("kind", ["parquet", "arrow", "save_to_disk"])
def test_chats_of_any_file_are_the_same(
    store: actstore.Store, job: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    table = pa.table({"messages": pa.array(CHATS)})
    path = tmp_path / f"chats.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        from datasets import Dataset

        Dataset.from_dict({"messages": CHATS}).save_to_disk(path)
    run = actstore.plan(**job | {"tokens": str(path), "out": str(tmp_path / "out")})
    assert run.plan.tokens_sha256 == store.plan.tokens_sha256
    assert run.packed is not None
    for name in ("roles", "turns", "documents"):
        np.testing.assert_array_equal(run.packed.rows(name, 0, 3), getattr(store, name)[:])


def test_packed_rows_that_go_over_borders_keep_their_roles(
    store: actstore.Store, job: dict[str, Any], tmp_path: Path
) -> None:
    more = {"context_length": 20, "packing": "concat", "begin_batch_token": "eos", "seed": 3}
    report = actstore.extract(actstore.plan(**job | more | {"out": str(tmp_path / "packed")}))
    packed = actstore.open(report.url)
    is_inserted = packed.documents[:] < 0
    assert is_inserted[:, 0].all()
    assert is_inserted.sum() == packed.shape[0]
    assert (packed.roles[:][is_inserted] == 0).all()
    row_of = {0: 0, 2: 1, 3: 2}
    rows = np.array([row_of[number] for number in packed.documents[:][~is_inserted].tolist()])
    for name in ("tokens", "roles", "turns"):
        whole = getattr(store, name)[:][rows, packed.offsets[:][~is_inserted]]
        np.testing.assert_array_equal(getattr(packed, name)[:][~is_inserted], whole)
    assert not actstore.verify(packed.url).findings


POSITIONS: dict[str, Callable[[list[int]], list[int]]] = {
    "role:assistant": lambda roles: [at for at, role in enumerate(roles) if role == 3],
    "role:user:last": lambda roles: [at for at, role in enumerate(roles) if role == 2][-1:],
    "role:template:last": lambda roles: [at for at, role in enumerate(roles) if role == 0][-1:],
}


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_of_a_role_are_where_the_array_of_roles_has_it(
    store: actstore.Store, job: dict[str, Any], tmp_path: Path, positions: str
) -> None:
    fields = job | {"positions": positions, "keep": ["id"], "seed": 3, "out": str(tmp_path / "out")}
    actstore.extract(actstore.plan(**fields))
    some = actstore.open(fields["out"])
    assert some.positions is not None
    (hook,) = some.hooks
    whole = {int(number): row for row, number in enumerate(store.documents[:, 0])}
    rows = [whole[int(number)] for number in some.documents[:, 0]]
    assert rows != sorted(rows)
    for name in ("tokens", "roles", "turns"):
        np.testing.assert_array_equal(getattr(some, name)[:], getattr(store, name)[:][rows])
    for row, expected in enumerate(POSITIONS[positions](store.roles[of].tolist()) for of in rows):
        n = len(expected)
        assert some.positions[row].tolist() == expected + [-1] * (some.shape[1] - n)
        torch.testing.assert_close(some[hook][row, :n], store[hook][rows[row], expected])
    assert max(some.counts[:]) == some.shape[1]
    assert some.column("id").to_pylist() == [0, 1, 2, 3]
    assert some.per_sequence("id").to_pylist() == some.documents[:, 0].tolist()
    assert not actstore.verify(some.url, deep=True).findings
    shown = " ".join(CliRunner().invoke(cli, ["info", some.url], catch_exceptions=False).output.split())
    assert f"tokens {store.n_tokens} in 3 sequences of {LENGTH}, from 3 documents" in shown
    assert "chats messages with roles and turns; template " in shown
    n_rows = sum(some.counts[:].tolist())
    slots = "1 slot" if some.shape[1] == 1 else f"{some.shape[1]} slots"
    assert f"positions {positions}: {n_rows} rows of each hook, in {slots} a sequence" in shown
    assert "columns id, kept by document" in shown


@pytest.mark.parametrize("damaged", ["roles/c.0.0", "turns/c.0.0", "positions/c.0.0"])
def test_a_store_with_all_of_it_is_repaired_to_the_same_bytes(
    job: dict[str, Any], tmp_path: Path, damaged: str
) -> None:
    fields = job | {"positions": "role:assistant", "keep": "id", "out": str(tmp_path / "out")}
    actstore.extract(actstore.plan(**fields))
    whole = bytes_below(LocalBlobs(fields["out"]))
    assert {key.split("/")[0] for key in whole} >= {
        "tokens",
        "lengths",
        "documents",
        "offsets",
        "roles",
        "turns",
        "positions",
    }
    data = bytearray(whole[damaged])
    data[0] ^= 1
    (tmp_path / "out" / damaged).write_bytes(data)
    (finding,) = actstore.verify(fields["out"]).findings
    assert (finding.key, finding.severity) == (damaged, "damage")
    actstore.verify(fields["out"], repair=True)
    assert not (tmp_path / "out" / damaged).exists()
    actstore.extract(actstore.plan(**fields))
    assert bytes_below(LocalBlobs(fields["out"])) == whole


def test_columns_of_chats_are_kept_up_to_the_last_chat_that_was_packed(
    job: dict[str, Any], tmp_path: Path
) -> None:
    fields = job | {"keep": ["messages", "id"], "max_tokens": 2 * LENGTH, "out": str(tmp_path / "out")}
    actstore.extract(actstore.plan(**fields))
    kept = actstore.open(fields["out"])
    assert kept.shape[0] == 2
    assert kept.column("id").to_pylist() == [0, 1, 2]
    assert kept.column("messages").to_pylist() == CHATS[:3]


def test_a_prompt_for_generation_tools_and_arguments_reach_the_template(
    job: dict[str, Any], tmp_path: Path
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ messages[0].content }}{{ mood }}{{ tools[0].name }}{% if add_generation_prompt %}?{% endif %}"
    )
    (tmp_path / "tools.json").write_text('[{"name": "look"}]')
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "I am "}]}))
    given = {
        "tokens": str(tmp_path / "one.jsonl"),
        "chat_template": str(template),
        "add_generation_prompt": True,
        "chat_template_arguments": {"mood": "fine"},
    }
    for tools in (str(tmp_path / "tools.json"), [{"name": "look"}]):
        run = actstore.plan(**job | given | {"tools": tools, "out": str(tmp_path / "out")})
        assert run.packed is not None
        n = run.plan.n_tokens
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        assert tokenizer.decode(run.packed.rows("tokens", 0, 1)[0, :n]) == "I am finelook?"
        chat = run.plan.request.tokens.chat
        assert chat is not None
        assert chat.model_dump() == {
            "template_sha256": chat.template_sha256,
            "add_generation_prompt": True,
            "tools": [{"name": "look"}],
            "arguments": {"mood": "fine"},
        }


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"chat_template": None}, TokensError, r"has no chat template .* chat_template \(--chat-template\)"),
        ({"chat": False, "column": None}, TokensError, "column messages of .* holds chats, and chat is false"),
        ({"chat": True, "column": "id"}, TokensError, "column id of .* holds neither strings nor lists"),
        ({"tools": "chats.jsonl"}, JobError, "tools .* is not JSON"),
        ({"tools": "object.json"}, JobError, "must hold a list of objects"),
        ({"tools": [3]}, JobError, "tools: should be the path or URL of a JSON file, or a list of objects"),
        ({"chat_template": "large"}, JobError, "chat_template .*large has 1,048,577 bytes, and 1,048,576 are the most"),
        ({"chat_template": "missing"}, actstore.errors.StorageError, "chat_template cannot be read"),
        ({"tokens": "text.txt"}, JobError, "chat_template is for chats, and .*text.txt holds none"),
        ({"tokens": "text.txt", "chat": True, "chat_template": None}, TokensError, "plain text without columns"),
        ({"positions": "after:friend"}, TokensError, "'after:friend' need text, and .*chats.jsonl has chats; choose"),
        ({"tokens": "text.txt", "chat_template": None, "context_length": 2, "positions": "role:user"}, JobError,
         "^positions role:user need chats, or token ids with token_roles, and these documents"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(
    job: dict[str, Any], tmp_path: Path, change: dict[str, Any], error: type[Exception], problem: str
) -> None:
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "large").write_text("x" * ((1 << 20) + 1))
    files = {"chats.jsonl": job["tokens"]} | {
        name: str(tmp_path / name) for name in ("object.json", "large", "missing", "text.txt")
    }
    change = {
        name: files.get(value, value) if isinstance(value, str) else value for name, value in change.items()
    }
    with pytest.raises(error, match=problem):
        actstore.plan(**job | change | {"out": str(tmp_path / "out")})


def test_a_store_without_chats_has_no_roles(job: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Who goes there? " * 100)
    text = {"tokens": str(tmp_path / "text.txt"), "chat_template": None, "context_length": 16}
    report = actstore.extract(actstore.plan(**job | text | {"out": str(tmp_path / "out")}))
    for name in ("roles", "turns"):
        with pytest.raises(
            HookError, match=f"holds .*text.txt, which are no chats, so its tokens have no {name}"
        ):
            getattr(actstore.open(report.url), name)


def test_the_same_job_goes_on_and_another_template_is_another_plan(
    store: actstore.Store, job: dict[str, Any], tmp_path: Path
) -> None:
    assert actstore.plan(**job).is_finished
    with pytest.raises(
        actstore.errors.PlanMismatchError, match=r"tokens.chat.add_generation_prompt is false in the store"
    ):
        actstore.plan(**job | {"add_generation_prompt": True})


Change = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], None]


def _flip(roles: Any, turns: Any) -> None:
    at = int(np.flatnonzero(roles[0] == 3)[1])
    roles[0, at] = 2


def _unknown(roles: Any, turns: Any) -> None:
    roles[1, 0] = 5


def _padding_in_text(roles: Any, turns: Any) -> None:
    roles[1, 0] = -1


def _text_in_padding(roles: Any, turns: Any) -> None:
    roles[1, -1] = 0


def _turn_of_template(roles: Any, turns: Any) -> None:
    turns[0, 0] = 0


def _negative_turn(roles: Any, turns: Any) -> None:
    turns[0, 0] = -2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_flip, "gives neighbouring tokens of one message different roles"),
        (_unknown, "holds roles that are not between -1 and 4"),
        (_padding_in_text, "has the role of padding elsewhere than behind the end"),
        (_text_in_padding, "has the role of padding elsewhere than behind the end"),
        (_turn_of_template, "the role of a message and no message, or the reverse"),
        (_negative_turn, "the role of a message and no message, or the reverse"),
    ],
)
def test_verify_finds_roles_that_cannot_be_even_if_checksums_agree(
    store: actstore.Store, tmp_path: Path, change: Change, problem: str
) -> None:
    shutil.copytree(store.url, tmp_path / "out")
    roles, turns = store.roles[:], store.turns[:]
    change(roles, turns)
    key = tokens_key("0000")
    record = TokensRecord.from_bytes((tmp_path / "out" / key).read_bytes(), key)
    shards = {shard.key: shard for shard in record.shards}
    for name, values in (("roles", roles), ("turns", turns)):
        layout = store.plan.token_array(name)
        stored = np.zeros((layout.chunks_in(0) * layout.chunk_rows, LENGTH), values.dtype)
        stored[: len(values)] = values
        encoded = encode(layout, 0, stored)
        data = b"".join(bytes(part) for part in encoded.parts)
        path = tmp_path / "out" / layout.key(0)
        path.write_bytes(data)
        shards[layout.key(0)] = shards[layout.key(0)].model_copy(update={"crc32c": crc32c(data)})
    changed = record.model_copy(update={"shards": tuple(shards[shard.key] for shard in record.shards)})
    (tmp_path / "out" / key).write_bytes(changed.to_bytes())
    found = [
        finding
        for finding in actstore.verify(str(tmp_path / "out")).findings
        if finding.key.startswith("roles/")
    ]
    assert [finding.problem for finding in found if problem in finding.problem]


def test_verify_finds_a_flipped_role(store: actstore.Store, tmp_path: Path) -> None:
    shutil.copytree(store.url, tmp_path / "out")
    path = tmp_path / "out/roles/c.0.0"
    data = bytearray(path.read_bytes())
    data[:] = data.replace(
        bytes([3]), bytes([2]), data.count(bytes([3]))
    )  # all of them, so that they go together
    path.write_bytes(data)
    assert {finding.key for finding in actstore.verify(str(tmp_path / "out")).findings} >= {"roles/c.0.0"}
