"""Activations that are read or else computed, against plain Hugging Face with one prompt alone and `run_with_cache`."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import actstore
from actstore.analysis.search import sequence_sha256
from actstore.errors import HookError, JobError, ModelError, PlanMismatchError, TokensError
from actstore.extraction.events import Event, SegmentDone
from actstore.hooks.naming.names import HookName
from actstore.recall.activations import stored_prompts
from actstore.recall.answers import Limits
from actstore.recall.known_sequences import digest
from tests.commands import FORKS, start_server
from tests.conftest import TinyModel

PROMPTS = ["My lord, I came to see your father's funeral.", "Ha!", "Who's there?", "naïve 漢字 🙂"]
HOOKS: list[HookName] = [("resid_post", 0), "blocks.2.hook_resid_post"]
STREAMS = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
Streams = dict[str, torch.Tensor]


class Plain:
    """The model and tokenizer of transformers, with nothing of actstore."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, prompt: str) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.tokenizer(prompt, add_special_tokens=False)["input_ids"]]

    def streams(self, ids: Sequence[int]) -> Streams:
        """The stream out of each layer, [position, d], of one prompt alone."""
        streams: Streams = {}
        handles = [
            layer.register_forward_hook(
                lambda _module, _args, output, number=number: streams.update(
                    {
                        f"blocks.{number}.hook_resid_post": (
                            output[0] if isinstance(output, tuple) else output
                        )[0].clone()
                    }
                )
            )
            for number, layer in enumerate(self.model.model.layers)
        ]
        with torch.no_grad():
            self.model(torch.tensor([list(ids)]))
        for handle in handles:
            handle.remove()
        return streams


class Counted:
    """A hooked model, and how often its first layer has run."""

    def __init__(self, folder: str) -> None:
        self.model = actstore.HookedModel.from_pretrained(folder)
        self.n_forwards = 0
        self.model.hf.model.layers[0].register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.n_forwards += 1


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModel) -> str:
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def plain(folder: str) -> Plain:
    return Plain(folder)


@pytest.fixture(scope="module")
def counted(folder: str) -> Counted:
    return Counted(folder)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "cache")
    if (tmp_path / "cache").exists():
        assert actstore.verify(str(tmp_path / "cache")).findings == ()


def assert_of(
    cache: Mapping[str, torch.Tensor],
    plain: Plain,
    rows: Sequence[Sequence[int]],
    hooks: Sequence[str] = STREAMS,
) -> None:
    """The cache has exactly these hooks, and what the plain model computes for each row alone."""
    assert set(cache) == set(hooks)
    for hook in hooks:
        assert cache[hook].shape == (len(rows), max(map(len, rows)), 64)
        for number, row in enumerate(rows):
            wanted = plain.streams(row)[hook]
            torch.testing.assert_close(cache[hook][number, : len(row)], wanted, atol=1e-4, rtol=1e-4)


def run_names(url: str) -> list[str]:
    return [run.plan.run for run in actstore.open(url).runs]


def test_the_first_call_is_run_with_cache_and_the_second_computes_nothing(
    counted: Counted, plain: Plain, here: str
) -> None:
    first = actstore.activations(counted.model, PROMPTS, HOOKS, here)
    assert counted.n_forwards > 0
    rows = [plain.ids(prompt) for prompt in PROMPTS]
    assert_of(first, plain, rows)
    assert first.model is counted.model
    _, cache = counted.model.run_with_cache(PROMPTS)
    for hook in STREAMS:
        assert first[hook].shape == cache[hook].shape
        for number, row in enumerate(rows):
            torch.testing.assert_close(first[hook][number, : len(row)], cache[hook][number, : len(row)])

    before = counted.n_forwards
    # The same prompts in other forms, of which the store knows only the ids.
    forms: list[Any] = [PROMPTS, tuple(rows), iter(PROMPTS), [torch.tensor(row) for row in rows]]
    for form in forms:
        again = actstore.activations(counted.model, form, HOOKS, here)
        for hook in STREAMS:
            assert torch.equal(again[hook].view(torch.int32), first[hook].view(torch.int32))
    assert counted.n_forwards == before
    assert run_names(here) == ["0000"]
    assert actstore.open(here).shape == (len(PROMPTS), 64)


def test_one_text_and_a_tensor(counted: Counted, plain: Plain, here: str) -> None:
    one = actstore.activations(counted.model, PROMPTS[0], HOOKS, here)
    assert_of(one, plain, [plain.ids(PROMPTS[0])])
    ids = torch.tensor([plain.ids(PROMPTS[0])[:5], [7, 8, 9, 10, 11]])
    assert_of(actstore.activations(counted.model, ids, HOOKS, here), plain, ids.tolist())


def test_patterns_are_as_wide_as_the_prompts(counted: Counted, here: str) -> None:
    hooks = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_q"]
    cache = actstore.activations(counted.model, PROMPTS[0], hooks, here)
    _, wanted = counted.model.run_with_cache(PROMPTS[0])
    for hook in hooks:
        torch.testing.assert_close(cache[hook], wanted[hook], atol=1e-4, rtol=1e-4)


def test_only_misses_are_computed_and_the_order_is_that_of_the_prompts(
    counted: Counted, plain: Plain, here: str
) -> None:
    known = actstore.activations(counted.model, PROMPTS[:2], HOOKS, here)
    mixed = [PROMPTS[2], PROMPTS[1], PROMPTS[3], PROMPTS[0]]
    cache = actstore.activations(counted.model, mixed, HOOKS, here)
    assert_of(cache, plain, [plain.ids(prompt) for prompt in mixed])
    assert [run.plan.n_sequences for run in actstore.open(here).runs] == [2, 2]
    length = len(plain.ids(PROMPTS[1]))
    assert torch.equal(cache[STREAMS[0]][1, :length], known[STREAMS[0]][1, :length])


def test_duplicates_are_computed_once(counted: Counted, plain: Plain, here: str) -> None:
    prompts: list[Any] = ["Ha!", "Who's there?", "Ha!", "Ha!"]
    cache = actstore.activations(counted.model, prompts, HOOKS, here)
    assert_of(cache, plain, [plain.ids(prompt) for prompt in prompts])
    assert actstore.open(here).shape[0] == 2


def test_other_hooks_are_added_over_the_same_tokens(counted: Counted, plain: Plain, here: str) -> None:
    actstore.activations(counted.model, PROMPTS, STREAMS[0], here)
    cache = actstore.activations(counted.model, PROMPTS[::-1], [*HOOKS, ("resid_post", 1)], here)
    rows = [plain.ids(prompt) for prompt in PROMPTS[::-1]]
    assert_of(cache, plain, rows, (*STREAMS, "blocks.1.hook_resid_post"))
    over = [(run.plan.run, run.plan.tokens_of, len(run.plan.hook_names)) for run in actstore.open(here).runs]
    assert over == [("0000", "0000", 1), ("0001", "0000", 2)]


def test_other_hooks_of_some_prompts_are_computed_for_these_alone(
    counted: Counted, plain: Plain, here: str
) -> None:
    actstore.activations(counted.model, PROMPTS, STREAMS[0], here)
    asked = [PROMPTS[1], "To be", PROMPTS[3]]
    cache = actstore.activations(counted.model, asked, HOOKS, here)
    assert_of(cache, plain, [plain.ids(prompt) for prompt in asked])
    runs = actstore.open(here).runs
    assert sorted((run.plan.n_sequences, len(run.plan.hook_names)) for run in runs) == [
        (1, 2),
        (2, 1),
        (4, 1),
    ]
    # Each hook is read from where it is, and then nothing is missing.
    before = counted.n_forwards
    assert_of(
        actstore.activations(counted.model, asked, HOOKS, here),
        plain,
        [plain.ids(prompt) for prompt in asked],
    )
    assert counted.n_forwards == before


def test_a_folder_is_a_model(folder: str, plain: Plain, counted: Counted, here: str) -> None:
    cache = actstore.activations(folder, PROMPTS, HOOKS, here)
    rows = [plain.ids(prompt) for prompt in PROMPTS]
    assert_of(cache, plain, rows)
    again = actstore.activations(folder, rows, HOOKS, here)
    assert all(torch.equal(cache[hook], again[hook]) for hook in STREAMS)
    assert run_names(here) == ["0000"]
    with pytest.raises(PlanMismatchError, match="a model in memory never counts as that of a folder"):
        actstore.activations(counted.model, PROMPTS, HOOKS, here)


def test_another_model_is_refused(counted: Counted, folder: str, here: str) -> None:
    actstore.activations(counted.model, PROMPTS, HOOKS, here)
    other = actstore.HookedModel.from_pretrained(folder)
    with torch.no_grad():
        other.hf.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-3
    for prompts in (PROMPTS, ["new"]):
        with pytest.raises(
            PlanMismatchError, match=r"holds activations of .* fingerprint memory:\w+, and"
        ) as info:
            actstore.activations(other, prompts, HOOKS, here)
        assert str(info.value).count(". ") == 0
    assert run_names(here) == ["0000"]


def _in_place(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight[0, 0] += 1e-3


def _through_data(weight: torch.Tensor) -> None:
    weight.data[0, 0] += 1e-3


def _through_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[0, 0] += 1e-3


def _back(weight: torch.Tensor) -> None:
    weight.data = weight.data.roll(1, 0)


@pytest.mark.parametrize("change", [_in_place, _through_data, _through_numpy, _back])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["hit", "miss"])
def test_a_model_that_is_changed_in_place_is_noticed(
    folder: str, here: str, change: Callable[[torch.Tensor], None], prompts: list[str]
) -> None:
    """Also where PyTorch's version counter of the weight stays as it was."""
    model = actstore.HookedModel.from_pretrained(folder)
    actstore.activations(model, PROMPTS[:1], HOOKS, here)
    change(model.hf.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(PlanMismatchError, match=r"holds activations of .* fingerprint memory:\w+, and"):
        actstore.activations(model, prompts, HOOKS, here)
    assert run_names(here) == ["0000"]


def test_a_miss_runs_its_batches_and_one_row(counted: Counted, here: str) -> None:
    before = counted.n_forwards
    actstore.activations(counted.model, [[number, 5] for number in range(2, 22)], HOOKS, here)
    assert counted.n_forwards == before + 3 + 1


def test_forwards_run_in_the_calling_thread(folder: str, here: str) -> None:
    model = actstore.HookedModel.from_pretrained(folder)
    threads = set()
    model.hf.model.layers[0].register_forward_hook(lambda *_: threads.add(threading.get_ident()))
    actstore.activations(model, PROMPTS, HOOKS, here)
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("mode", ["autocast", "inference", "device"])
def test_modes_of_the_calling_thread_change_no_bit(
    counted: Counted, here: str, tmp_path: Path, mode: str
) -> None:
    modes: dict[str, Any] = {
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode(),
        "device": torch.device("meta"),
    }
    rows = [[5, 6, 7], [8, 9]]
    wanted = actstore.activations(counted.model, rows, HOOKS, tmp_path / "plain")
    with modes[mode]:
        actstore.activations(counted.model, rows, HOOKS, here)
    found = actstore.activations(counted.model, rows, HOOKS, here)
    for hook in STREAMS:
        assert torch.equal(found[hook].view(torch.int32), wanted[hook].view(torch.int32))


def test_another_dtype_is_refused(folder: str, here: str) -> None:
    half = actstore.activations(folder, PROMPTS[:1], HOOKS, here, dtype=torch.bfloat16)
    assert half[STREAMS[0]].dtype == torch.bfloat16
    with pytest.raises(PlanMismatchError, match="holds bfloat16, and float32 was asked for"):
        actstore.activations(folder, PROMPTS, HOOKS, here)


def test_places_of_prompts(counted: Counted, here: str) -> None:
    """What a server tells of prompts: their sequences in the store, in their order, with one of them twice."""
    rows = [[5, 6, 7], [8, 9], [5, 6, 7], [10]]
    found = stored_prompts(counted.model, rows, HOOKS, here, Limits(9, 10**9))
    assert found.lengths.tolist() == [3, 2, 3, 1]
    store = actstore.open(here)
    assert set(found.sequences) == set(STREAMS)
    for sequences in found.sequences.values():
        for row, sequence in zip(rows, sequences.tolist(), strict=True):
            assert store.tokens[sequence, : len(row)].tolist() == row


def test_limits(counted: Counted, here: str) -> None:
    """Of tokens in one call, and of bytes of the store in all; what is there costs nothing."""
    nbytes = 2 * 64 * 64 * 4  # of a sequence, both hooks
    limits = Limits(8, 3 * nbytes)
    with pytest.raises(TokensError, match="have 9 tokens, and 8 are the most at once"):
        stored_prompts(counted.model, [[1, 2, 3, 4, 5], [6, 7, 8, 9]], HOOKS, here, limits)
    for rows in ([[1, 2, 3, 4], [5, 6, 7, 8]], [[9, 10]]):
        stored_prompts(counted.model, rows, HOOKS, here, limits)
    with pytest.raises(TokensError, match="GB more, and .* GB are the most; ask for fewer prompts or hooks"):
        stored_prompts(counted.model, [[11]], HOOKS, here, limits)
    stored_prompts(counted.model, [[9, 10], [1, 2, 3, 4]], HOOKS, here, limits)
    assert actstore.open(here).shape[0] == 3


def test_lengths(counted: Counted, plain: Plain, here: str, tmp_path: Path) -> None:
    actstore.activations(counted.model, "Ha!", HOOKS, here)
    fits, longer = [list(range(3, 67))], [list(range(3, 68))]
    assert_of(actstore.activations(counted.model, fits, HOOKS, here), plain, fits)
    with pytest.raises(
        TokensError, match=r"has 65 tokens, and sequences of .* have room for 64; give another"
    ):
        actstore.activations(counted.model, longer, HOOKS, here)
    with pytest.raises(PlanMismatchError, match="has sequences of 64 tokens, and context_length is 70"):
        actstore.activations(counted.model, "Ha!", HOOKS, here, context_length=70)
    other = tmp_path / "other"
    with pytest.raises(TokensError, match="has 65 tokens, and sequences of .* have room for 20"):
        actstore.activations(counted.model, longer, HOOKS, other, context_length=20)
    with pytest.raises(TokensError, match="has 129 tokens, and .* has 128 positions"):
        actstore.activations(counted.model, [list(range(1, 130))], HOOKS, other)
    assert not other.exists()
    assert_of(actstore.activations(counted.model, longer, HOOKS, other, context_length=70), plain, longer)
    assert actstore.open(str(other)).plan.context_length == 70


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        pytest.param([], "a list without any prompt; give at least one", id="none"),
        pytest.param([[1, 2], []], "prompt 1 has no token", id="empty"),
        pytest.param([[{"role": "user", "content": "Ha!"}]], "tokens are chats", id="chats"),
    ],
)
def test_prompts_that_are_none(counted: Counted, here: str, prompts: Any, message: str) -> None:
    with pytest.raises(TokensError, match=message):
        actstore.activations(counted.model, prompts, HOOKS, here)
    assert not Path(here).exists()


def test_hooks_and_models_that_are_none(counted: Counted, here: str) -> None:
    with pytest.raises(HookError, match="hook_resid"):
        actstore.activations(counted.model, PROMPTS, "blocks.9.hook_resid_post", here)
    with pytest.raises(ModelError, match="model is a int"):
        actstore.activations(3, PROMPTS, HOOKS, here)  # type: ignore[arg-type]
    with pytest.raises(JobError, match="dtype float16 was asked for"):
        actstore.activations(counted.model, PROMPTS, HOOKS, here, dtype="float16")
    assert not Path(here).exists()


@pytest.mark.parametrize("option", ["batch_size", "context_length"])
def test_sizes_are_those_of_the_first_call(counted: Counted, here: str, option: str) -> None:
    sizes: dict[str, Any] = {option: 0}
    with pytest.raises(JobError, match=f"activations: 1 problem: {option}"):
        actstore.activations(counted.model, PROMPTS, HOOKS, here, **sizes)
    assert not Path(here).exists()
    sizes = {option: 32}
    for prompts in (PROMPTS[:2], PROMPTS):
        actstore.activations(counted.model, prompts, HOOKS, here, **sizes)
    for run in actstore.open(here).runs:
        found = {"batch_size": run.plan.request.batch_size, "context_length": run.plan.context_length}
        assert found == {"batch_size": 8, "context_length": 64} | sizes


@pytest.mark.parametrize(("n_prompts", "batch_size"), [(63, 8), (64, 16)])
def test_a_store_that_begins_with_many_prompts_has_larger_batches(
    counted: Counted, here: str, n_prompts: int, batch_size: int
) -> None:
    rows = [[number, 7] for number in range(2, 2 + n_prompts)]
    actstore.activations(counted.model, rows, HOOKS, here)
    assert actstore.open(here).plan.request.batch_size == batch_size


def test_a_store_of_extract_is_read_and_added_to(counted: Counted, plain: Plain, here: str) -> None:
    actstore.extract(model=counted.model, tokens=PROMPTS[:2], hooks=HOOKS, out=here)
    before = counted.n_forwards
    rows = [plain.ids(prompt) for prompt in PROMPTS[:2]]
    assert_of(actstore.activations(counted.model, rows, HOOKS, here), plain, rows)
    assert counted.n_forwards == before
    # Its tokens were made by a tokenizer, so another hook is computed for them beside it.
    hooks = (*STREAMS, "blocks.1.hook_resid_post")
    assert_of(actstore.activations(counted.model, rows[::-1], hooks, here), plain, rows[::-1], hooks)
    assert actstore.open(here).shape[0] == 4


def test_a_store_of_chosen_positions_is_refused(counted: Counted, here: str) -> None:
    actstore.extract(model=counted.model, tokens=PROMPTS, hooks=HOOKS, out=here, positions="last")
    with pytest.raises(PlanMismatchError, match="holds only the positions last"):
        actstore.activations(counted.model, PROMPTS, HOOKS, here)


def test_hashes_are_those_of_searches() -> None:
    ids = np.array([0, 5, 299], np.int32)
    assert digest(ids).hex() == sequence_sha256(ids.tolist())


def test_known_sequences_are_read_once(counted: Counted, plain: Plain, tmp_path: Path) -> None:
    url = str(tmp_path / "cache")
    actstore.activations(counted.model, PROMPTS[:2], HOOKS, url)
    actstore.activations(counted.model, PROMPTS[:2], HOOKS, url)
    for name in ("tokens", "lengths"):
        for shard in (tmp_path / "cache" / name).glob("c.*"):
            shard.unlink()
    # The second part is new, and the first one's tokens are gone.
    rows = [plain.ids(prompt) for prompt in PROMPTS[:3]]
    for _ in range(2):
        assert_of(actstore.activations(counted.model, PROMPTS[:3], HOOKS, url), plain, rows)
    assert actstore.open(url).shape[0] == 3


def test_a_store_in_the_place_of_another_is_read_anew(counted: Counted, plain: Plain, here: str) -> None:
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[2:]):
        for _ in range(2):
            cache = actstore.activations(counted.model, prompts, HOOKS, here)
            assert_of(cache, plain, [plain.ids(prompt) for prompt in prompts])
        shutil.rmtree(here)


def _extract_and_die(folder: str, out: str, rows: list[list[int]]) -> None:
    def die(event: Event) -> None:
        if isinstance(event, SegmentDone):
            os.kill(os.getpid(), signal.SIGKILL)

    model = actstore.HookedModel(AutoModelForCausalLM.from_pretrained(folder).eval())
    job: dict[str, Any] = {"batch_size": 1, "segment_size": 1, "context_length": 64}
    actstore.extract(model=model, tokens=rows, hooks=HOOKS, out=out, on_event=die, **job)


def test_a_run_that_was_killed_is_completed(counted: Counted, plain: Plain, folder: str, here: str) -> None:
    start_server()
    rows = [plain.ids(prompt) for prompt in PROMPTS]
    process = FORKS.Process(target=_extract_and_die, args=(folder, here, rows))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not actstore.open(here).is_complete
    asked = [rows[3], [5, 6, 7]]
    assert_of(actstore.activations(counted.model, asked, HOOKS, here), plain, asked)
    store = actstore.open(here)
    assert store.is_complete
    assert [run.plan.n_sequences for run in store.runs] == [4, 1]


@pytest.mark.parametrize("hook", [STREAMS[0], "blocks.1.hook_resid_post"])
def test_a_run_that_was_killed_before_its_tokens_were_stored(
    counted: Counted, plain: Plain, here: str, hook: str
) -> None:
    actstore.activations(counted.model, PROMPTS, STREAMS[0], here)
    plan = Path(here, "_actstore/runs/0000/plan.json").read_bytes()
    shutil.rmtree(here)
    Path(here, "_actstore/runs/0000").mkdir(parents=True)
    Path(here, "_actstore/runs/0000/plan.json").write_bytes(plan)
    cache = actstore.activations(counted.model, PROMPTS, hook, here)
    assert_of(cache, plain, [plain.ids(prompt) for prompt in PROMPTS], [hook])
    store = actstore.open(here)
    assert store.is_complete
    assert store.shape[0] == len(PROMPTS)


def _ask(folder: str, url: str, calls: list[list[list[int]]], hooks: Any, barrier: Any, out: str) -> None:
    caches = []
    try:
        model = actstore.HookedModel.from_pretrained(folder)
        for rows in calls:
            barrier.wait(120)
            caches.append(dict(actstore.activations(model, rows, hooks, url)))
    except BaseException:
        barrier.abort()  # so that the other one does not wait
        raise
    torch.save(caches, out)


@pytest.mark.parametrize("kind", ["same", "overlapping", "hooks"])
def test_two_processes_at_once(plain: Plain, folder: str, here: str, tmp_path: Path, kind: str) -> None:
    """Both begin at the same moment, five times over, and both get what is right, whoever wins."""
    start_server()
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 300, size=int(length)).tolist() for length in rng.integers(3, 30, size=24)]
    left = [rows[first : first + 8] for first in range(0, 20, 4)]
    right = [call[::-1] for call in left] if kind == "overlapping" else left
    right = [[*call, [number]] for number, call in enumerate(right, 2)] if kind == "overlapping" else right
    hooks = [STREAMS, STREAMS if kind != "hooks" else ("blocks.1.hook_resid_post", STREAMS[1])]
    barrier = FORKS.Barrier(2)
    outs = [str(tmp_path / f"{side}.pt") for side in ("left", "right")]
    processes = [
        FORKS.Process(target=_ask, args=(folder, here, calls, asked, barrier, out))
        for calls, asked, out in zip((left, right), hooks, outs, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    for calls, asked, out in zip((left, right), hooks, outs, strict=True):
        for call, values in zip(calls, torch.load(out), strict=True):
            assert_of(values, plain, call, asked)
    assert actstore.open(here).is_complete
