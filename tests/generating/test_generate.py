"""Generated text: what Hugging Face generates, the same after any interruption, and captured as it was computed."""

import json
import subprocess
import sys
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
from actstore.errors import JobError, MissingExtraError, PlanMismatchError, StorageError, TokensError
from actstore.generating.run import generate, seed_of
from actstore.generating.seeded import SeededSampling

PROMPTS = ["Who goes there?", "Enter the ghost", "A", "I am thy father's spirit, doomed for a certain term"]
HOOK = "blocks.1.hook_resid_post"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def own(model: Path) -> tuple[Any, Any]:
    """The model and its tokenizer as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)


@pytest.fixture
def fields(model: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model": str(model), "max_new_tokens": 12, "out": str(tmp_path / "out.jsonl"), "batch_size": 3}


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]


def test_greedy_continuations_are_those_of_hugging_face(own: tuple[Any, Any], fields: dict[str, Any]) -> None:
    hugging_face, tokenizer = own
    generate(given=PROMPTS, temperature=0, **fields)
    rows = rows_of(fields["out"])
    assert [row["prompt"] for row in rows] == PROMPTS
    for row, prompt in zip(rows, PROMPTS, strict=True):
        given = tokenizer(prompt, return_tensors="pt")
        made = hugging_face.generate(
            **given, max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=1
        )[0].tolist()
        assert row["input_ids"] == made
        n = given["input_ids"].shape[1]
        assert row["n_prompt_tokens"] == n
        assert row["finish"] == ("stop" if made[-1] == 1 else "length")
        assert row["roles"] == [2] * n + [0 if token == 1 else 3 for token in made[n:]]
        assert row["turns"] == [0] * n + [-1 if token == 1 else 1 for token in made[n:]]
        assert row["completion"] == tokenizer.decode(made[n:], skip_special_tokens=True)


def test_a_continuation_depends_on_its_own_seed_only(fields: dict[str, Any], tmp_path: Path) -> None:
    made = {}
    for batch_size in (1, 3, 8):
        changed = fields | {"batch_size": batch_size, "out": str(tmp_path / f"{batch_size}.jsonl")}
        generate(given=PROMPTS, n=3, top_k=40, top_p=0.9, temperature=0.8, seed=5, **changed)
        made[batch_size] = [row["input_ids"] for row in rows_of(changed["out"])]
    assert made[1] == made[3] == made[8]
    assert len({tuple(ids) for ids in made[1]}) == len(PROMPTS) * 3
    rows = rows_of(str(tmp_path / "3.jsonl"))
    assert [(row["prompt_number"], row["sample"]) for row in rows] == [
        (p, s) for p in range(4) for s in range(3)
    ]
    assert [row["seed"] for row in rows] == [seed_of(5, p, s) for p in range(4) for s in range(3)]
    assert {key: rows[0][key] for key in ("temperature", "top_p", "top_k", "max_new_tokens", "engine")} == {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "max_new_tokens": 12,
        "engine": "hf",
    }
    other = fields | {"out": str(tmp_path / "other.jsonl")}
    generate(given=PROMPTS, n=3, top_k=40, top_p=0.9, temperature=0.8, seed=6, **other)
    assert all(a != row["input_ids"] for a, row in zip(made[1], rows_of(other["out"]), strict=True))


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf, -1.0])
    n = 20_000
    drawn = SeededSampling(range(n))(torch.empty(n, 0), logits.expand(n, -1)).argmax(1)
    counts = np.bincount(drawn.numpy(), minlength=5)
    expected = logits.softmax(0).numpy()
    assert counts[3] == 0
    assert (np.abs(counts / n - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9).all()


def test_chats_are_continued_by_the_assistant(
    own: tuple[Any, Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    template: dict[str, Any] = {"chat_template": str(tmp_path / "t.jinja"), "seed": 1}
    generate(prompts=str(tmp_path / "chats.jsonl"), **template, **fields)
    tokenizer = own[1]
    for row, chat in zip(rows_of(fields["out"]), chats, strict=True):
        n = row["n_prompt_tokens"]
        rendered = tokenizer.apply_chat_template(
            chat, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=True
        )
        assert row["input_ids"][:n] == rendered["input_ids"]
        assert row["messages"] == [*chat, {"role": "assistant", "content": row["completion"]}]
        said = [token for token, role in zip(row["input_ids"], row["roles"], strict=True) if role == 2]
        assert tokenizer.decode(said) == chat[0]["content"]
        assert set(row["roles"][n:]) <= {0, 3}
    memory = fields | {"out": str(tmp_path / "memory.jsonl")}
    generate(given=chats, **template, **memory)
    assert rows_of(memory["out"]) == rows_of(fields["out"])


_KILLED = """
import os, sys, json
from actstore.generating.run import generate
fields = json.loads(sys.argv[1])
generate(given=json.loads(sys.argv[2]), on_event=lambda event: event.part == 1 and os._exit(9), **fields)
"""


def test_a_killed_run_goes_on_and_ends_in_the_same_file(fields: dict[str, Any], tmp_path: Path) -> None:
    whole = fields | {"out": str(tmp_path / "whole.jsonl"), "n": 3}
    generate(given=PROMPTS, **whole)
    killed = fields | {"n": 3}
    arguments = [sys.executable, "-c", _KILLED, json.dumps(killed), json.dumps(PROMPTS)]
    assert subprocess.run(arguments, check=False).returncode == 9
    assert not Path(killed["out"]).exists()
    assert sorted(path.name for path in Path(killed["out"] + ".parts").iterdir()) == [
        "00000000.jsonl",
        "00000001.jsonl",
    ]
    events: list[Any] = []
    report = generate(given=PROMPTS, on_event=events.append, **killed)
    assert [event.part for event in events] == [2, 3]
    assert (report.n_continuations, report.n_continuations_made) == (12, 6)
    assert Path(killed["out"]).read_bytes() == Path(whole["out"]).read_bytes()
    assert not Path(killed["out"] + ".parts").exists()
    again = generate(given=PROMPTS, on_event=events.append, **killed)
    assert (again.n_continuations_made, len(events)) == (0, 2)


def test_parquet_holds_the_same(fields: dict[str, Any], tmp_path: Path) -> None:
    generate(given=PROMPTS, n=2, **fields)
    table = fields | {"out": str(tmp_path / "out.parquet")}
    generate(given=PROMPTS, n=2, **table)
    assert pq.read_table(table["out"]).to_pylist() == rows_of(fields["out"])


def during_generation(own: tuple[Any, Any], ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """(the ids of a greedy generation, the output of layer 1 at all but the last of them, for which nothing was
    computed), as hooks of torch see it.
    """
    hugging_face, _ = own
    seen: list[torch.Tensor] = []
    hook = hugging_face.model.layers[1].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        made = hugging_face.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=1,
        )[0].tolist()
    finally:
        hook.remove()
    computed = torch.cat(seen, 1)[0]
    assert computed.shape[0] == len(made) - 1
    return made, computed


def command(fields: dict[str, Any], *more: str) -> dict[str, Any]:
    """Run ``actstore generate`` with these fields, greedily, and return its report."""
    options = [text for name, value in fields.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    arguments = ["generate", *options, "--temperature", "0", "--json", "--quiet", *more]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_captured_activations_are_those_of_the_generation(
    own: tuple[Any, Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    prompts = {"prompts": tmp_path / "prompts.txt", "documents": "line"}
    url = str(tmp_path / "store")
    report = command(fields | prompts, "--capture", url, "--hooks", HOOK)
    assert report["capture"]["n_tokens"] > 0
    store = actstore.open(url)
    for row, prompt in enumerate(PROMPTS):
        given = own[1](prompt)["input_ids"]
        ids, computed = during_generation(own, given)
        n = len(ids)
        assert store.lengths[row] == n
        assert store.tokens[row, :n].tolist() == ids
        torch.testing.assert_close(store[HOOK][row, : n - 1], computed, rtol=1e-4, atol=1e-5)
        # The prompt is the user's, and the answer the assistant's, but for the token that ends it.
        is_end = [token == 1 for token in ids[len(given) :]]
        assert store.roles[row, :n].tolist() == [2] * len(given) + [0 if end else 3 for end in is_end]
        assert store.turns[row, :n].tolist() == [0] * len(given) + [-1 if end else 1 for end in is_end]


CHATS = [
    [{"role": "user", "content": "Who goes there?"}],
    [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Speak"},
    ],
    [{"role": "user", "content": "A"}],
]
NUMBERS = {"system": 1, "user": 2, "assistant": 3}


@pytest.mark.parametrize("positions", ["all", "role:assistant", "last"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_capture_of_chats_has_their_roles_columns_and_positions(
    own: tuple[Any, Any], fields: dict[str, Any], tmp_path: Path, positions: str, suffix: str
) -> None:
    tokenizer = own[1]
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    labelled = [
        {"messages": chat, "label": number % 2, "id": f"c{number}"} for number, chat in enumerate(CHATS)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    asked = fields | {
        "prompts": tmp_path / "chats.jsonl",
        "chat_template": tmp_path / "t.jinja",
        "keep": "label,id",
        "n": 2,
        "seed": 3,
        "out": tmp_path / f"out{suffix}",
    }
    url = str(tmp_path / "store")
    command(asked, "--capture", url, "--hooks", HOOK, "--positions", positions)
    store = actstore.open(url)
    assert store.shape[0] == 2 * len(CHATS)
    for row in range(store.shape[0]):
        number, sample = divmod(row, 2)
        chat = CHATS[number]
        prompt = tokenizer.apply_chat_template(
            chat, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=True
        )["input_ids"]
        ids, computed = during_generation(own, prompt)
        n = len(ids)
        assert store.tokens[row, :n].tolist() == ids
        roles, turns = store.roles[row, :n], store.turns[row, :n]
        for turn, message in enumerate(chat):
            assert tokenizer.decode(np.array(ids)[turns == turn]) == message["content"]
            assert set(roles[turns == turn]) == {NUMBERS[message["role"]]}
        said = [at for at in range(len(prompt), n) if ids[at] != 1]
        assert np.flatnonzero(turns == len(chat)).tolist() == said
        assert set(roles[said]) <= {3}
        assert ((roles == 0) == (turns == -1)).all()
        chosen = {
            "all": list(range(n)),
            "role:assistant": np.flatnonzero(roles == 3).tolist(),
            "last": [n - 1],
        }[positions]
        if positions != "all":
            assert store.positions is not None
            assert store.positions[row, : len(chosen)].tolist() == chosen
            assert store.counts[row] == len(chosen)
        entries = [entry for entry, at in enumerate(chosen) if at < n - 1]
        torch.testing.assert_close(
            store[HOOK][row, entries],
            computed[[chosen[entry] for entry in entries]],
            rtol=1e-4,
            atol=1e-5,
        )
        values = {name: store.per_sequence(name)[row].as_py() for name in store.columns}
        assert values == {
            "label": number % 2,
            "id": f"c{number}",
            "prompt_number": number,
            "sample": sample,
            "seed": seed_of(3, number, sample),
            "finish": "stop" if ids[-1] == 1 else "length",
            "n_prompt_tokens": len(prompt),
            "temperature": 0,
            "top_p": 1,
            "top_k": None,
            "max_new_tokens": 12,
            "engine": "hf",
        }
    assert actstore.verify(url).findings == ()


def test_prompts_of_any_kind_keep_their_columns(fields: dict[str, Any], tmp_path: Path) -> None:
    made = {}
    table = pa.table({"text": PROMPTS, "label": [1, 0, None, 1], "tags": [["x"], [], None, ["y", "z"]]})
    pq.write_table(table, tmp_path / "prompts.parquet")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    sources: dict[str, dict[str, Any]] = {
        "memory": {"given": table},
        "parquet": {"prompts": str(tmp_path / "prompts.parquet")},
        "jsonl": {"prompts": str(tmp_path / "prompts.jsonl")},
    }
    for name, prompts in sources.items():
        changed = fields | {"out": str(tmp_path / f"{name}.jsonl")}
        generate(keep=["label", "tags"], n=2, **prompts, **changed)
        made[name] = rows_of(changed["out"])
    assert made["memory"] == made["parquet"] == made["jsonl"]
    assert [row["label"] for row in made["jsonl"]] == [1, 1, 0, 0, None, None, 1, 1]
    assert [row["tags"] for row in made["jsonl"]][-1] == ["y", "z"]
    with pytest.raises(PlanMismatchError, match="prompts_sha256 is"):
        generate(
            keep=["label", "tags"],
            n=2,
            given=table.set_column(1, "label", pa.array([1, 0, 0, 1])),
            **fields | {"out": str(tmp_path / "memory.jsonl")},
        )


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"out": "text.txt"}, JobError, "written to a file .jsonl or .parquet"),
        ({"max_new_tokens": 127}, JobError, "has 128 positions; choose fewer"),
        ({"temperature": -1}, JobError, "temperature: input should be greater than or equal to 0"),
        ({"given": []}, TokensError, "tokens is a list without any prompt"),
        ({"given": ["a", ""]}, TokensError, "prompt 1 of prompts in memory is empty"),
        ({"given": ["a"], "tools": [{}]}, JobError, "tools is for chats"),
        (
            {"keep": "seed"},
            JobError,
            "keep names seed, and generated text has a column of its own of that name",
        ),
        ({"keep": "label"}, TokensError, "columns label are to be kept .* the prompts are in no table"),
        (
            {"given": pa.table({"text": ["a"], "day": pa.array([0], pa.date32())}), "keep": "day"},
            TokensError,
            "day in prompt 0 is a date, which cannot be kept",
        ),
        ({"engine": "vllm"}, MissingExtraError, r"pip install 'actstore\[vllm\]'"),
    ],
)
def test_what_cannot_be_is_refused(
    fields: dict[str, Any], change: dict[str, Any], error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        generate(**{"given": PROMPTS} | fields | change)


def test_another_job_does_not_go_on_with_the_file(fields: dict[str, Any], tmp_path: Path) -> None:
    generate(given=PROMPTS, **fields)
    with pytest.raises(PlanMismatchError, match="seed is 0 there, 1 was asked for"):
        generate(given=PROMPTS, seed=1, **fields)
    with pytest.raises(PlanMismatchError, match="prompts_sha256 is"):
        generate(given=PROMPTS[1:], **fields)
    (tmp_path / "mine.jsonl").write_text("{}")
    with pytest.raises(StorageError, match="is there already, and was not generated"):
        generate(given=PROMPTS, **fields | {"out": str(tmp_path / "mine.jsonl")})
    assert (tmp_path / "mine.jsonl").read_text() == "{}"
