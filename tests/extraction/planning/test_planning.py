"""Everything is checked before anything is written: an error of one sentence, and nothing left behind."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import actstore
from actstore.errors import ActstoreError, HookError, JobError, ModelError, StorageError, TokensError

Fields = dict[str, Any]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        pytest.param({"model": "no/such"}, ModelError, "neither a folder nor a model", id="unknown model"),
        pytest.param(
            {"hooks": ["blocks.0.hook_resid_pst"]},
            HookError,
            "nearest names are blocks.0.hook_resid_post",
            id="no such hook",
        ),
        pytest.param(
            {"context_length": 4096}, JobError, r"4096 is longer than the \d+ positions", id="context"
        ),
        pytest.param({"tokens": "/no/such.txt"}, TokensError, "such.txt", id="no text"),
        pytest.param(
            {"segment_size": 12},
            JobError,
            r"segment_size 12 must be a multiple of 8.*choose 16",
            id="segment",
        ),
        pytest.param({"max_tokens": 8}, TokensError, "less than one sequence of 32", id="max_tokens"),
        pytest.param(
            {"executor": "slurm"},
            JobError,
            "executor 'slurm' is not known; choose one of inline, process, ray",
            id="executor",
        ),
        pytest.param({"out": "nowhere://x/y"}, StorageError, "nowhere://x/y cannot be opened", id="scheme"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    fields: Fields, change: Fields, kind: type[ActstoreError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        actstore.extract(actstore.plan(**fields | change))
    assert "\n" not in str(caught.value)
    assert not Path(fields["out"]).exists()


def test_empty_text(fields: Fields, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(TokensError, match="empty|no document|0 rows"):
        actstore.plan(**fields | {"tokens": str(tmp_path / "empty.txt")})
    assert not Path(fields["out"]).exists()


def test_missing_column_lists_the_columns(fields: Fields, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "some text"}\n')
    wrong = fields | {"tokens": str(tmp_path / "a.jsonl"), "documents": "file"}
    with pytest.raises(TokensError, match="body"):
        actstore.plan(**wrong)


def test_a_tokenizer_without_the_token_that_packing_needs(
    fields: Fields, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(TokensError, match="has no BOS token, which begin_batch_token='bos' needs"):
        actstore.plan(**fields | {"tokenizer": str(tmp_path / "tokenizer")})


def test_a_file_where_the_store_should_be(fields: Fields, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="a file is where a folder is needed"):
        actstore.plan(**fields | {"out": str(tmp_path / "file")})


def test_a_disk_that_is_too_small(fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    from actstore.storage.local import LocalBlobs

    # The disk cannot be made small here; what it says can.
    monkeypatch.setattr(LocalBlobs, "free_nbytes", lambda _: 1000)
    with pytest.raises(StorageError, match=r"would need 0\.00 GB and the disk has 0\.00 GB free"):
        actstore.plan(**fields)
    assert not Path(fields["out"]).exists()


def test_more_memory_than_there_is(fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine cannot be made small here; what it says can.
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100}[name])
    with pytest.raises(JobError, match=r"hold 0\.0 GB of activations .* smaller batch_size or segment_size"):
        actstore.plan(**fields)
    assert not Path(fields["out"]).exists()


@pytest.mark.parametrize("context_length", [2, 15, 20, 31, 100, 127, 128])
def test_any_length_of_sequences_gives_segments_of_moderate_size(fields: Fields, context_length: int) -> None:
    # Prompts for patching have odd lengths and all kinds of hooks.
    hooks = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern", "blocks.*.attn.hook_z"]
    del fields["batch_size"], fields["segment_size"]
    changes = {"hooks": hooks, "context_length": context_length, "max_tokens": 2 * context_length}
    plan = actstore.plan(**fields | changes).plan
    batch_size = plan.request.batch_size
    assert batch_size * context_length <= 4096 < 2 * batch_size * context_length
    assert plan.segment_size <= 4096


def test_the_batch_size_of_a_store_is_the_default_of_later_jobs(fields: Fields) -> None:
    changes = {"batch_size": 3, "segment_size": 48, "max_tokens": 48 * 32}
    actstore.extract(actstore.plan(**fields | changes))
    del fields["batch_size"], fields["segment_size"]
    more = fields | {"hooks": ["blocks.0.hook_attn_out"], "max_tokens": 48 * 32}
    assert actstore.plan(**more).plan.request.batch_size == 3


HERE: Fields = {"executor": "inline"}
LOCAL_RAY: Fields = {"executor": "ray", "num_workers": 2}
ELSEWHERE: Fields = {"executor": "ray", "ray_address": "auto"}


@pytest.mark.parametrize("chosen", [HERE, LOCAL_RAY], ids=["inline", "ray"])
@pytest.mark.parametrize("moment", ["plan", "extract"])
def test_the_executor_that_is_chosen_is_checked_for_memory_and_device(
    fields: Fields, monkeypatch: pytest.MonkeyPatch, chosen: Fields, moment: str
) -> None:
    """A plan for a cluster need not fit this machine, but must once the work is to be done here."""

    def refused(**more: Any) -> str:
        attempt: Callable[[], object] = partial(actstore.plan, **fields, **chosen, **more)
        if moment == "extract":
            run = actstore.plan(**fields, **ELSEWHERE, **more)
            run = dataclasses.replace(run, job=run.job.model_copy(update={"ray_address": None}))
            attempt = partial(actstore.extract, run, **chosen)
        with pytest.raises(JobError) as caught:
            attempt()
        assert not Path(fields["out"]).exists()
        return str(caught.value)

    assert "device 'cuda' was asked for, and torch finds no GPU on this machine" in refused(device="cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    if chosen is LOCAL_RAY:
        assert "2 workers with a GPU each were asked for, and this machine has 1" in refused(device="cuda")
    else:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
        ours = {"device": "cuda:3"} if moment == "plan" else {}
        if ours:
            assert "has 3 of them, from cuda:0 on" in refused(**ours)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 700}[name])
    if chosen is LOCAL_RAY:  # 1.6 MB each, and there are 2.9
        assert refused().startswith("2 workers would hold 0.0 GB of activations in memory")
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100}[name])
    assert "would hold 0.0 GB of activations in memory and this machine has 0.0 GB" in refused()


def test_one_gpu_of_several_is_not_for_ray_workers(fields: Fields) -> None:
    with pytest.raises(JobError, match="Ray gives each worker a GPU of its own.*; choose cuda$"):
        actstore.plan(**fields, **ELSEWHERE, device="cuda:1")


def test_planning_alone_writes_nothing(fields: Fields) -> None:
    run = actstore.plan(**fields)
    assert not Path(fields["out"]).exists()
    shown = str(run)
    for part in (
        "3,200 in 100 sequences of 32",
        "4: blocks.0.hook_resid_post",
        "7 of 16 sequences",
        "1.6 MB in each worker",
    ):
        assert part in shown
    assert "hooks     4: blocks.0.hook_resid_post ... " in shown
    two = actstore.plan(**fields | {"hooks": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]})
    assert "hooks     2: blocks.0.hook_resid_post, blocks.1.hook_resid_post\n" in str(two)
    assert run.to_dict()["nbytes"] == run.plan.nbytes == run.nbytes_to_write


def test_the_default_dtype_is_the_saved_one(fields: Fields) -> None:
    assert actstore.plan(**fields).plan.request.dtype == "float32"
