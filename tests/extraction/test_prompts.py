"""Prompts given in memory, from one call to a store, against plain Hugging Face with one prompt alone."""

import dataclasses
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import actstore
from actstore.cli.main import run as command_line
from actstore.errors import JobError, PlanMismatchError, TokensError
from actstore.extraction.events import Event, SegmentDone
from tests.commands import FORKS, start_server
from tests.conftest import TinyModel

HOOKS = [("resid_post", 0), "blocks.2.hook_resid_post"]
LAYERS = (0, 2)
PROMPTS = [
    "My lord, I came to see your father's funeral.",
    "",
    "Ha!",
    "My lord, I came to see your father's funeral.",
    "naïve 漢字 🙂",
    "<bos>Who's there?",
    " leading space",
]
Fields = dict[str, Any]


class Plain:
    """The model and tokenizer of transformers, with nothing of actstore."""

    def __init__(self, folder: Path) -> None:
        # As the store takes the streams: the last one is before the final norm.
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.folder = str(folder)

    def ids(self, prompt: str) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.tokenizer(prompt, add_special_tokens=False)["input_ids"]]

    def streams(self, ids: Sequence[int]) -> dict[int, torch.Tensor]:
        """The stream out of each layer, [position, d], of one prompt alone."""
        streams: dict[int, torch.Tensor] = {}
        handles = [
            layer.register_forward_hook(
                lambda _module, _args, output, number=number: streams.update(
                    {number: (output[0] if isinstance(output, tuple) else output)[0].clone()}
                )
            )
            for number, layer in enumerate(self.model.model.layers)
        ]
        with torch.no_grad():
            self.model(torch.tensor([list(ids)]))
        for handle in handles:
            handle.remove()
        return streams


@pytest.fixture(scope="module")
def plain(tiny_model: TinyModel) -> Plain:
    return Plain(tiny_model("llama"))


def assert_holds(url: str, plain: Plain, rows: Sequence[Sequence[int]]) -> actstore.Store:
    """The store holds these ids, one row each, and what the plain model computes for each alone."""
    store = actstore.open(url)
    assert store.is_complete
    assert store.lengths[:].tolist() == [len(row) for row in rows]
    for number, row in enumerate(rows):
        assert store.tokens[number][: len(row)].tolist() == list(row)
        streams = plain.streams(row)
        for layer in LAYERS:
            stored = store["resid_post", layer][number][: len(row)]
            torch.testing.assert_close(stored, streams[layer], atol=1e-4, rtol=1e-4)
    return store


def extract(plain: Plain, out: Path, tokens: Any, **fields: Any) -> actstore.Report:
    return actstore.extract(**{"model": plain.folder, "tokens": tokens, "hooks": HOOKS, "out": out} | fields)


def test_a_list_of_prompts_is_a_store_of_each_alone(plain: Plain, tmp_path: Path) -> None:
    report = extract(plain, tmp_path / "s", PROMPTS)
    rows = [plain.ids(prompt) for prompt in PROMPTS]
    store = assert_holds(report.url, plain, rows)
    assert store.shape[:2] == (len(PROMPTS), max(map(len, rows)))
    assert report.n_tokens == sum(map(len, rows))
    assert (report.n_truncated, report.n_tokens_cut) == (0, 0)
    # Row i is prompt i, and says so, even if only the BOS token is in it.
    assert store.documents[:].max(axis=1).tolist() == list(range(len(PROMPTS)))
    assert actstore.verify(report.url, deep=True).findings == ()


def test_a_list_of_prompts_is_what_run_with_cache_gives(plain: Plain, tmp_path: Path) -> None:
    model = actstore.HookedModel.from_pretrained(plain.folder)
    report = extract(plain, tmp_path / "s", PROMPTS, model=model)
    store = actstore.open(report.url)
    _, cache = model.run_with_cache(PROMPTS)
    for number, length in enumerate(store.lengths[:]):
        for layer in LAYERS:
            wanted = cache["resid_post", layer][number, :length]
            torch.testing.assert_close(store["resid_post", layer][number][:length], wanted)


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_bos_is_that_of_the_hooked_model(plain: Plain, tmp_path: Path, prepend_bos: bool) -> None:
    model = actstore.HookedModel.from_pretrained(plain.folder, prepend_bos=prepend_bos)
    report = extract(plain, tmp_path / "s", ["Ha!", "Who's there?"], model=model)
    rows = [model.to_tokens(prompt)[0].tolist() for prompt in ("Ha!", "Who's there?")]
    assert (rows[0][0] == 0) == prepend_bos
    assert_holds(report.url, plain, rows)


def test_a_tokenizer_without_bos_puts_nothing_in_front(plain: Plain, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain.folder)
    tokenizer.bos_token = None
    report = extract(plain, tmp_path / "s", ["Ha!"], tokenizer=tokenizer)
    assert_holds(report.url, plain, [plain.ids("Ha!")[1:]])
    with pytest.raises(TokensError, match="document 1 is empty, and no token is put before it"):
        extract(plain, tmp_path / "other", ["Ha!", ""], tokenizer=tokenizer)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=12),
    st.sampled_from(["left", "right"]),
    st.sampled_from([2, 7, 40]),
)
def test_any_prompts(
    plain: Plain, tmp_path_factory: pytest.TempPathFactory, prompts: list[str], end: str, length: int
) -> None:
    """Of any length and number, duplicates, empty ones, any characters, longer than the context."""
    out = tmp_path_factory.mktemp("any") / "s"
    report = extract(plain, out, prompts, truncate=end, context_length=length)
    rows, n_truncated, n_cut = [], 0, 0
    for prompt in prompts:
        bos, *rest = plain.ids(prompt)
        kept = rest[: length - 1] if end == "right" else rest[max(0, len(rest) - length + 1) :]
        rows.append([bos, *kept])
        n_truncated, n_cut = n_truncated + (len(kept) < len(rest)), n_cut + len(rest) - len(kept)
    assert_holds(report.url, plain, rows)
    assert (report.n_truncated, report.n_tokens_cut) == (n_truncated, n_cut)
    shutil.rmtree(out)


IDS = [[5, 6, 7, 8], [9], [5, 6, 7, 8], [0, 0, 1]]


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        pytest.param(IDS, IDS, id="lists"),
        pytest.param(torch.tensor([IDS[0], IDS[2]]), [IDS[0], IDS[2]], id="tensor"),
        pytest.param(datasets.Dataset.from_dict({"input_ids": IDS}), IDS, id="data set"),
        pytest.param(
            {
                "input_ids": np.array([[5, 6, 0], [7, 8, 9]]),
                "attention_mask": np.array([[1, 1, 0], [1, 1, 1]]),
            },
            [[5, 6], [7, 8, 9]],
            id="padded",
        ),
    ],
)
def test_ids_pass_unchanged(plain: Plain, tmp_path: Path, tokens: Any, rows: list[list[int]]) -> None:
    report = extract(plain, tmp_path / "s", tokens)
    store = assert_holds(report.url, plain, rows)
    assert store.plan.request.tokens.begin_batch_token is None


def test_a_folder_of_save_to_disk(plain: Plain, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": PROMPTS[2:]}).save_to_disk(tmp_path / "saved")
    report = extract(plain, tmp_path / "s", tmp_path / "saved", packing="document")
    assert_holds(report.url, plain, [plain.ids(text.removeprefix("<bos>")) for text in PROMPTS[2:]])


def test_files_with_a_context_as_long_as_the_longest(plain: Plain, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("Ha!\n\nWho's there, my lord?\n")
    job = {"packing": "document", "documents": "line", "context_length": "auto"}
    report = extract(plain, tmp_path / "s", tmp_path / "lines.txt", **job)
    rows = [plain.ids("Ha!"), plain.ids("Who's there, my lord?")]
    store = assert_holds(report.url, plain, rows)
    assert store.shape[1] == len(rows[1])
    assert "nothing to do" in str(extract(plain, tmp_path / "s", tmp_path / "lines.txt", **job))


def test_the_same_prompts_go_on_and_others_are_refused(plain: Plain, tmp_path: Path) -> None:
    extract(plain, tmp_path / "s", PROMPTS)
    again = extract(plain, tmp_path / "s", pd.DataFrame({"text": PROMPTS}))
    assert "nothing to do" in str(again)
    with pytest.raises(
        PlanMismatchError, match=r"tokens.files is memory:\w+ \(\d+ bytes\) in the store, memory:"
    ):
        extract(plain, tmp_path / "s", PROMPTS[:-1])
    added = extract(plain, tmp_path / "s", ["Ha!"], append=True)
    assert added.run == "0001"
    store = actstore.open(str(tmp_path / "s"))
    assert store.shape[0] == len(PROMPTS) + 1
    with_hook = extract(plain, tmp_path / "s", PROMPTS, hooks=[*HOOKS, "blocks.1.hook_resid_post"])
    assert with_hook.run == "0002"


@pytest.mark.parametrize("column", ["keep", "positions"])
@pytest.mark.parametrize("append", [False, True])
def test_the_same_prompts_with_other_columns_are_others(
    plain: Plain, tmp_path: Path, column: str, append: bool
) -> None:
    """Labels and listed positions are part of what is stored, so none is left out for being beside known prompts."""
    before, after = ([0, 1, 0], [0, 1, 1]) if column == "keep" else ([[0], [1], [0]], [[0], [1], [1]])
    fields: dict[str, Any] = {"keep": ["x"]} if column == "keep" else {"positions": "column:x"}
    table = {"text": ["Ha! Ha!", "Who's there?", "My lord"]}
    extract(plain, tmp_path / "s", pd.DataFrame(table | {"x": before}), **fields)
    same = extract(plain, tmp_path / "s", pa.table(table | {"x": before}), **fields)
    assert "nothing to do" in str(same), "the same values in a table of another library"
    if append:
        extract(plain, tmp_path / "s", pd.DataFrame(table | {"x": after}), append=True, **fields)
    else:
        with pytest.raises(PlanMismatchError, match=r"tokens.files is memory:"):
            extract(plain, tmp_path / "s", pd.DataFrame(table | {"x": after}), **fields)
    store = actstore.open(str(tmp_path / "s"))
    if column == "keep":
        stored = store.per_sequence("x").to_pylist()
    else:
        assert store.positions is not None
        stored = store.positions[:].tolist()
    assert stored == [*before, *(after if append else [])]


@pytest.mark.parametrize("seed", [None, 3])
def test_of_a_longer_list_only_the_rest_is_added(plain: Plain, tmp_path: Path, seed: int | None) -> None:
    texts = ["Who's there? Ha!", "Ha!", "My lord", "Ha!", "Speak", "Ha! Ha!", "there"]
    labels = [3, 1, 4, 1, 5, 9, 2]

    def add(start: int, stop: int) -> Any:
        table = pa.table({"text": texts[start:stop], "x": labels[start:stop]})
        return extract(plain, tmp_path / "s", table, keep=["x"], append=True, seed=seed)

    def check(added: Any, n_added: int, n: int) -> None:
        store = actstore.open(str(tmp_path / "s"))
        assert store.runs[-1].plan.n_sequences == n_added
        assert store.runs[-1].plan.run == added.run
        assert store.shape[0] == n
        ids = [store.tokens[row, : store.lengths[row]].tolist() for row in range(n)]
        joined = sorted(zip(ids, store.per_sequence("x").to_pylist(), strict=True))
        assert joined == sorted(zip(map(plain.ids, texts[:n]), labels, strict=False))
        if seed is None:
            assert ids == [plain.ids(text) for text in texts[:n]]

    check(add(0, 3), 3, 3)
    check(add(0, 5), 2, 5)
    assert "nothing to do" in str(add(0, 5))
    check(add(5, 6), 1, 6)  # a list of its own, which continues what is stored
    check(add(0, 7), 1, 7)
    with pytest.raises(
        TokensError, match=r"the store holds 6 sequences of this text, and it has 6 .*nothing to add"
    ):
        add(0, 6)
    assert actstore.verify(str(tmp_path / "s")).findings == ()


@pytest.mark.parametrize("change", ["label", "hooks", "prompt"])
def test_a_list_that_begins_otherwise_is_added_whole(plain: Plain, tmp_path: Path, change: str) -> None:
    texts, labels = ["Ha! Ha!", "Who", "My lord"], [3, 1, 4]
    fields: dict[str, Any] = {"keep": ["x"], "append": True}
    extract(plain, tmp_path / "s", pa.table({"text": texts[:2], "x": labels[:2]}), **fields)
    if change == "label":
        labels[1] = 2
    elif change == "prompt":
        texts[1] = "Why"
    else:
        fields["hooks"] = [*HOOKS, "blocks.1.hook_resid_post"]
    extract(plain, tmp_path / "s", pa.table({"text": texts, "x": labels}), **fields)
    assert actstore.open(str(tmp_path / "s")).runs[-1].plan.n_sequences == 3


def test_longer_prompts_that_a_store_has_no_room_for(plain: Plain, tmp_path: Path) -> None:
    extract(plain, tmp_path / "s", ["Ha!"])
    with pytest.raises(PlanMismatchError) as caught:
        extract(plain, tmp_path / "s", PROMPTS, append=True)
    message = str(caught.value)
    assert "tokens.context_length is" in message
    assert "shorten what is to be added, or choose another out, and a context_length there" in message
    assert "tokens.files" not in message, "other prompts are what append is for"


def _extract_and_die(folder: str, out: str) -> None:
    def die(event: Event) -> None:
        if isinstance(event, SegmentDone):
            os.kill(os.getpid(), signal.SIGKILL)

    actstore.extract(
        model=folder, tokens=PROMPTS * 3, hooks=HOOKS, out=out, batch_size=2, segment_size=4, on_event=die
    )


def test_a_killed_run_goes_on_with_the_same_list(plain: Plain, tmp_path: Path) -> None:
    start_server()
    out = tmp_path / "s"
    process = FORKS.Process(target=_extract_and_die, args=(plain.folder, str(out)))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    job: Fields = {"batch_size": 2, "segment_size": 4}
    with pytest.raises(PlanMismatchError, match="tokens.files is memory:"):
        extract(plain, out, PROMPTS, **job)
    report = extract(plain, out, PROMPTS * 3, **job)
    assert 0 < report.n_segments_before < report.n_segments
    assert_holds(report.url, plain, [plain.ids(prompt) for prompt in PROMPTS * 3])


@pytest.mark.ray
def test_ray_stores_the_same_bytes(plain: Plain, tmp_path: Path) -> None:
    job: Fields = {"batch_size": 2, "segment_size": 4}
    extract(plain, tmp_path / "inline", PROMPTS * 2, **job)
    extract(plain, tmp_path / "ray", PROMPTS * 2, **job, executor="ray", num_workers=1)
    inline, ray = (
        {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in sorted((tmp_path / name).rglob("*"))
            if path.is_file()
        }
        for name in ("inline", "ray")
    )
    assert inline == ray


def test_a_generator_and_its_list_are_one_store(plain: Plain, tmp_path: Path) -> None:
    def prompts() -> Iterator[str]:
        yield from PROMPTS

    extract(plain, tmp_path / "s", prompts())
    assert "nothing to do" in str(extract(plain, tmp_path / "s", PROMPTS))


def test_long_prompts_are_refused_until_the_job_says_where_to_cut(plain: Plain, tmp_path: Path) -> None:
    prompts = ["Ha!", "my lord " * 200]  # the model has 128 positions
    with pytest.raises(
        TokensError,
        match=r"1 of 2 documents are longer than the 128 positions of .*; choose truncate: left or right",
    ):
        extract(plain, tmp_path / "s", prompts)
    with pytest.raises(TokensError, match="2 of 2 documents do not fit in a sequence of 2 tokens"):
        extract(plain, tmp_path / "s", prompts, context_length=2)
    assert not (tmp_path / "s").exists()
    run = actstore.plan(model=plain.folder, tokens=prompts, hooks=HOOKS, out=tmp_path / "s", truncate="left")
    n_cut = len(plain.ids(prompts[1])) - 128
    assert (run.to_dict()["n_truncated"], run.to_dict()["n_tokens_cut"]) == (1, n_cut)
    assert f"cut       {n_cut} tokens of 1 document" in str(run)
    report = actstore.extract(run)
    assert f"cut      {n_cut} tokens of 1 document" in str(report)
    ids = plain.ids(prompts[1])
    assert_holds(report.url, plain, [plain.ids("Ha!"), [ids[0], *ids[-127:]]])
    assert actstore.verify(report.url, deep=True).findings == ()
    assert "nothing to do" in str(extract(plain, tmp_path / "s", prompts, truncate="left"))


def test_cuts_are_told_on_the_command_line(
    plain: Plain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text("Ha!\nWho's there, my lord?\n")
    options = ["--model", plain.folder, "--tokens", str(tmp_path / "lines.txt"), "--documents", "line"]
    options += ["--packing", "document", "--hooks", "blocks.0.hook_resid_post", "--out", str(tmp_path / "s")]
    assert command_line(["extract", *options, "--context-length", "4"]) == 1
    assert "1 of 2 documents do not fit in a sequence of 4 tokens" in capsys.readouterr().err
    assert command_line(["extract", *options, "--context-length", "4", "--truncate", "right"]) == 0
    n_cut = len(plain.ids("Who's there, my lord?")) - 4
    printed = capsys.readouterr()
    assert f"{n_cut} tokens of 1 document" in printed.out
    assert "1 document cut" in printed.err
    assert command_line(["info", str(tmp_path / "s")]) == 0
    assert f"document, {n_cut} tokens of 1 document cut at the right" in capsys.readouterr().out
    options[-1] = str(tmp_path / "whole")
    assert command_line(["extract", *options, "--context-length", "auto"]) == 0
    assert actstore.open(options[-1]).shape[1] == len(plain.ids("Who's there, my lord?"))


OLD: Fields = {"tokens": "lines.txt", "documents": "line", "packing": "document", "context_length": 4}


def test_a_store_of_an_earlier_version_that_cut_silently(plain: Plain, tmp_path: Path) -> None:
    """Its plan has no `truncate` and no counts; its job had none either."""
    (tmp_path / "lines.txt").write_text("Ha!\nWho's there, my lord?\nHa!\n" * 4)
    job = OLD | {
        "model": plain.folder,
        "tokens": str(tmp_path / "lines.txt"),
        "hooks": HOOKS,
        "batch_size": 2,
    }
    job |= {"segment_size": 4, "out": tmp_path / "s"}
    run = actstore.plan(**job, truncate="right")
    tokens = run.plan.request.tokens.model_copy(update={"truncate": None})
    request = run.plan.request.model_copy(update={"tokens": tokens})
    old = run.plan.model_copy(update={"request": request, "n_truncated": 0, "n_tokens_cut": 0})
    actstore.extract(dataclasses.replace(run, plan=old))
    assert "truncate" not in actstore.open(str(tmp_path / "s")).metadata["request"]["tokens"]
    runs = tmp_path / "s/_actstore"
    (runs / "manifest.json").unlink()
    (runs / "runs/0000/commits/00000001.json").unlink()
    assert actstore.extract(**job).n_segments_before == 2  # as it was made, from the tokens that it has
    assert "nothing to do" in str(actstore.extract(**job, truncate="right"))
    with pytest.raises(PlanMismatchError, match="tokens.truncate is None in the store, left was asked for"):
        actstore.extract(**job, truncate="left")
    # Killed before its tokens were written, it needs the text, and the text has to be cut.
    (runs / "manifest.json").unlink()
    (runs / "runs/0000/tokens.json").unlink()
    with pytest.raises(TokensError, match="4 of 12 documents do not fit .* choose truncate: left or right"):
        actstore.extract(**job)
    actstore.extract(**job, truncate="right")
    assert actstore.verify(str(tmp_path / "s"), deep=True).findings == ()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        pytest.param(
            {"tokens": [[5, 300]]}, TokensError, "has the token id 300 at offset 1", id="vocabulary"
        ),
        pytest.param(
            {"tokens": "Who is there?"},
            TokensError,
            r"nothing is found at Who is there\?; .*; if it is a prompt, give a list in Python",
            id="bare string",
        ),
        pytest.param(
            {"tokens": "Who is there?", "context_length": 8},
            TokensError,
            r"nothing is found at Who is there\?; .*; if it is a prompt, give a list in Python: tokens=\['Who is",
            id="bare string with a context",
        ),
        pytest.param(
            {"tokens": "memory:00", "context_length": 8},
            TokensError,
            "the same prompts again",
            id="memory",
        ),
        pytest.param({"context_length": 200}, JobError, "200 is longer than the 128 positions", id="context"),
        pytest.param({"packing": "concat"}, JobError, "context_length: is required", id="concat"),
        pytest.param(
            {"packing": "concat", "context_length": 8, "truncate": "left"},
            JobError,
            "truncate: is for",
            id="cut",
        ),
        pytest.param({"tokenizer": 5}, JobError, "tokenizer is a int; give a tokenizer", id="tokenizer"),
        pytest.param({"hooks": [("resid_post", "x")]}, actstore.errors.HookError, "is not a hook", id="hook"),
        pytest.param({"hooks": 5}, JobError, "hooks: should be hook names", id="hooks"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    plain: Plain, tmp_path: Path, change: Fields, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        extract(plain, tmp_path / "s", **{"tokens": ["Ha!"]} | change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_a_planned_run_has_all_fields_already(plain: Plain, tmp_path: Path) -> None:
    run = actstore.plan(model=plain.folder, tokens=["Ha!"], hooks=HOOKS, out=tmp_path / "s")
    with pytest.raises(JobError, match="dtype cannot be given with a planned run"):
        actstore.extract(run, dtype="float16")


def test_a_job_of_a_file_takes_prompts_in_memory(plain: Plain, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: {plain.folder}\ntokens: x.txt\nhooks: blocks.*.hook_resid_post\nout: {tmp_path}/s\n"
    )
    report = actstore.extract(str(job), tokens=["Ha!"], dtype=torch.float32)
    assert_holds(report.url, plain, [plain.ids("Ha!")])
