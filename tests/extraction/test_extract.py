"""From a job to a store, against the plain Hugging Face forward, NumPy, zarr-python and tensorstore."""

import contextlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from transformers import AutoModelForCausalLM

import actstore
from actstore.cli.main import run
from actstore.errors import (
    ExtractError,
    IncompleteError,
    ModelError,
    NotCommittedError,
    PlanMismatchError,
    StorageError,
)
from actstore.extraction.events import Event, SegmentDone, Tokenised
from tests.commands import Command

Fields = dict[str, Any]


def unseal(fields: Fields) -> None:
    """Make a store look as if its run was killed: finished stores are read by their manifest."""
    Path(fields["out"], "_actstore/manifest.json").unlink()


def files(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def plain_forward(store: actstore.Store, layer: int) -> torch.Tensor:
    """[N, L, d] hidden states after a layer, batch by batch in the shape of the plan, by transformers alone."""
    request = store.plan.request
    dtype = getattr(torch, request.dtype)
    model = AutoModelForCausalLM.from_pretrained(request.model.name, dtype=dtype).eval()
    tokens = torch.from_numpy(store.tokens[:]).long()
    batches = []
    for start in range(0, len(tokens), request.batch_size):
        rows = tokens[start : start + request.batch_size]
        filled = torch.cat([rows, rows[-1:].repeat(request.batch_size - len(rows), 1)])
        with torch.inference_mode():
            states = model(filled, output_hidden_states=True).hidden_states
        batches.append(states[layer + 1][: len(rows)])
    return torch.cat(batches)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_rows_are_bit_equal_to_the_plain_forward(fields: Fields, dtype: str) -> None:
    report = actstore.extract(actstore.plan(**fields, dtype=dtype))
    store = actstore.open(fields["out"])
    assert store.is_complete
    assert report.n_tokens_computed == report.n_tokens == 3200
    assert store.hooks == (
        "blocks.0.hook_resid_post",
        "blocks.1.hook_mlp_out",
        "blocks.1.hook_resid_post",
        "blocks.2.hook_resid_post",
    )
    for layer in (0, 1):
        acts = store["resid_post", layer]
        assert acts.dtype == getattr(torch, dtype)
        assert acts.shape == (100, 32, 64)
        assert torch.equal(acts[:], plain_forward(store, layer))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zarr_python_and_tensorstore_read_the_same_bits(fields: Fields, dtype: str) -> None:
    actstore.extract(actstore.plan(**fields, dtype=dtype))
    store = actstore.open(fields["out"])
    group = zarr.open_group(fields["out"], mode="r")
    assert sorted(name for name, _ in group.members()) == [
        "_actstore", "acts", "documents", "lengths", "norms", "offsets", "tokens"
    ]  # fmt: skip
    for hook in store.hooks:
        ours = store[hook].numpy()
        width = f"u{ours.itemsize}"
        by_zarr = np.asarray(zarr.open_array(fields["out"], path=f"acts/{hook}", mode="r")[...])
        spec = {"driver": "zarr3", "kvstore": f"file://{fields['out']}/acts/{hook}/"}
        by_tensorstore = tensorstore.open(spec).result().read().result()
        assert np.array_equal(by_zarr.view(width), ours.view(width))
        assert np.array_equal(by_tensorstore.view(width), ours.view(width))
        assert store[hook].zarr.metadata.to_dict()["dimension_names"] == ("sequence", "position", "d_model")
    norms = np.stack([store[name].norms[:] for name in store.plan.hook_names], axis=1)
    spec = {"driver": "zarr3", "kvstore": f"file://{fields['out']}/norms/0000/"}
    assert np.array_equal(tensorstore.open(spec).result().read().result(), norms)
    assert np.array_equal(zarr.open_array(fields["out"], path="norms/0000", mode="r")[...], norms)
    for name in ("tokens", "lengths", "documents", "offsets"):
        assert np.array_equal(
            np.asarray(zarr.open_array(fields["out"], path=name, mode="r")[...]), getattr(store, name)[:]
        )


def test_a_second_run_has_nothing_to_do(fields: Fields) -> None:
    actstore.extract(actstore.plan(**fields))
    before = files(fields["out"])
    run = actstore.plan(**fields)
    assert run.pending == ()
    assert run.packed is None  # the text was not even read again
    report = actstore.extract(run)
    assert (report.n_tokens_computed, report.n_segments_before) == (0, 7)
    assert "nothing to do" in str(report)
    assert files(fields["out"]) == before


def test_two_runs_of_one_job_give_the_same_bytes(fields: Fields, tmp_path: Path) -> None:
    actstore.extract(actstore.plan(**fields))
    actstore.extract(actstore.plan(**fields | {"out": str(tmp_path / "again")}))
    assert files(fields["out"]) == files(tmp_path / "again")


def test_a_rerun_computes_only_what_is_missing(fields: Fields) -> None:
    actstore.extract(actstore.plan(**fields))
    before = files(fields["out"])
    unseal(fields)
    commits = Path(fields["out"], "_actstore/runs/0000/commits")
    for index in (2, 6):
        (commits / f"{index:08d}.json").unlink()
    with pytest.raises(NotCommittedError, match=r"sequences 32:33 of .* \(segment 2\) are not committed"):
        actstore.open(fields["out"])["resid_post", 0][32]
    done: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, SegmentDone):
            done.append(event.segment)

    actstore.extract(actstore.plan(**fields), on_event=note)
    assert sorted(done) == [2, 6]
    assert files(fields["out"]) == before


def remove(fields: Fields, *segments: int) -> None:
    for segment in segments:
        Path(fields["out"], f"_actstore/runs/0000/commits/{segment:08d}.json").unlink()


@pytest.mark.parametrize("kind", ["record", "tokens", "records of all"])
def test_what_is_removed_during_a_run_is_not_called_complete(
    fields: Fields, tmp_path: Path, kind: str
) -> None:
    actstore.extract(actstore.plan(**fields | {"out": str(tmp_path / "undisturbed")}))
    done: list[int] = []

    def disturb(event: Event) -> None:
        assert isinstance(event, SegmentDone)
        done.append(event.segment)
        if len(done) == (7 if kind == "records of all" else 4):
            if kind == "tokens":
                Path(fields["out"], "_actstore/runs/0000/tokens.json").unlink()
            else:
                remove(fields, *(done if kind == "records of all" else done[:1]))

    with pytest.raises(IncompleteError, match=r"run the same command again$") as caught:
        actstore.extract(actstore.plan(**fields), on_event=disturb)
    assert "\n" not in str(caught.value)
    assert not actstore.open(fields["out"]).is_complete or kind == "tokens"
    report = actstore.extract(actstore.plan(**fields))
    assert report.n_segments_before == {"record": 6, "tokens": 7, "records of all": 0}[kind]
    assert files(fields["out"]) == files(tmp_path / "undisturbed")


def test_a_finished_run_that_lost_a_record_is_not_called_complete(
    fields: Fields, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    actstore.extract(actstore.plan(**fields))
    before = files(fields["out"])
    remove(fields, 3)
    assert run(["extract", *options, "--quiet"]) == 75
    assert f"after `actstore verify {fields['out']} --repair`" in capsys.readouterr().err
    actstore.verify(fields["out"], repair=True)
    assert run(["extract", *options, "--quiet"]) == 0
    assert files(fields["out"]) == before


def test_shards_that_a_killed_run_left_are_adopted_not_replaced(fields: Fields) -> None:
    actstore.extract(actstore.plan(**fields))
    store = Path(fields["out"])
    shard = store / "acts/blocks.0.hook_resid_post/c.3.0.0"
    unseal(fields)
    (store / "_actstore/runs/0000/commits/00000003.json").unlink()
    inode = shard.stat().st_ino
    (store / "acts/blocks.2.hook_resid_post/c.3.0.0").unlink()
    before = files(store)
    actstore.extract(actstore.plan(**fields))
    assert shard.stat().st_ino == inode
    assert len(files(store)) == len(before) + 3


# A shell gives its background jobs an ignored SIGINT, and Python keeps it so; a terminal does not.
COMMAND = """
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
from actstore.cli.main import main; main()
"""


@pytest.fixture(scope="module")
def long_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed") / "store"


@pytest.mark.parametrize(
    "kill",
    [pytest.param(signal.SIGKILL, marks=pytest.mark.faults), signal.SIGTERM, signal.SIGINT],
    ids=lambda kill: kill.name,
)
def test_killed_midway_and_run_again(
    fields: Fields, options: list[str], long_undisturbed: Path, tmp_path: Path, kill: signal.Signals
) -> None:
    fields |= {"max_tokens": 1000 * 32}
    options += ["--max-tokens", str(1000 * 32)]
    if not long_undisturbed.exists():
        actstore.extract(actstore.plan(**fields | {"out": str(long_undisturbed)}))
    commits = Path(fields["out"], "_actstore/runs/0000/commits")
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = Command("extract", *options, code=COMMAND, stdout=stderr, stderr=stderr)
    deadline = time.monotonic() + 120
    while len(list(commits.glob("*.json"))) < 3:
        # It needs the core on which this would look again and again.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
    process.send_signal(kill)
    assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGINT: 130}[kill]
    errors = log.read_text()
    if kill != signal.SIGKILL:
        assert "the same command continues from there" in errors
        assert "Traceback" not in errors
    n_before = len(list(commits.glob("*.json")))
    assert 3 <= n_before < 63

    report = actstore.extract(actstore.plan(**fields))
    assert report.n_segments_before == n_before
    assert report.n_tokens_computed == report.n_tokens - n_before * 16 * 32
    shutil.rmtree(Path(fields["out"], "_actstore/partial"), ignore_errors=True)
    assert files(fields["out"]) == files(long_undisturbed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype is float32 in the store, bfloat16 was asked for"),
        ({"batch_size": 4}, "batch_size is 8 in the store, 4 was asked for"),
        ({"context_length": 16}, "tokens.context_length is 32 in the store, 16 was asked for"),
        ({"seed": 3}, "tokens.seed is null in the store, 3 was asked for"),
        ({"segment_size": 32}, "segment_size is 16 in the store, 32 was asked for"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_plan_on_the_same_store_is_refused(fields: Fields, change: Fields, message: str) -> None:
    actstore.extract(actstore.plan(**fields))
    before = files(fields["out"])
    with pytest.raises(PlanMismatchError, match=message):
        actstore.plan(**fields | change)
    assert files(fields["out"]) == before


def test_other_weights_on_the_same_store_are_refused(fields: Fields, tmp_path: Path) -> None:
    actstore.extract(actstore.plan(**fields))
    other = tmp_path / "model"
    shutil.copytree(fields["model"], other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    model.save_pretrained(other)
    with pytest.raises(PlanMismatchError, match=r"model\.fingerprint is crc32c:\w{8} in the store, crc32c:"):
        actstore.plan(**fields | {"model": str(other)})


def test_a_model_that_changes_between_plan_and_run_is_refused(fields: Fields, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(fields["model"], copy)
    run = actstore.plan(**fields | {"model": str(copy)})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(ModelError, match="the plan was made with"):
        actstore.extract(run)


def test_the_same_model_at_another_path_goes_on(fields: Fields, tmp_path: Path) -> None:
    actstore.extract(actstore.plan(**fields))
    copy = tmp_path / "copy"
    shutil.copytree(fields["model"], copy)
    assert actstore.plan(**fields | {"model": str(copy)}).pending == ()


def test_other_text_under_the_same_name_is_refused(fields: Fields, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(Path(fields["tokens"]).read_bytes())
    fields |= {"tokens": str(text)}
    actstore.extract(actstore.plan(**fields))
    text.write_text(text.read_text() + "more")
    with pytest.raises(
        PlanMismatchError,
        match=r"tokens\.files is text\.txt \(\d+ bytes, CRC-32C \w+\) in the store, text\.txt",
    ):
        actstore.plan(**fields)


def test_a_run_killed_before_its_tokens_were_whole_goes_on(fields: Fields) -> None:
    actstore.extract(actstore.plan(**fields))
    before = files(fields["out"])
    root = Path(fields["out"])
    unseal(fields)
    shutil.rmtree(root / "_actstore/runs/0000/commits")
    (root / "_actstore/runs/0000/tokens.json").unlink()
    (root / "documents/c.0.0").unlink()
    with pytest.raises(NotCommittedError, match="tokens .* are not committed"):
        actstore.open(fields["out"]).tokens[0]
    actstore.extract(actstore.plan(**fields))
    assert files(fields["out"]) == before


def test_damaged_tokens_are_not_built_upon(fields: Fields) -> None:
    actstore.extract(actstore.plan(**fields))
    root = Path(fields["out"])
    unseal(fields)
    (root / "_actstore/runs/0000/tokens.json").unlink()
    shard = root / "tokens/c.0.0"
    damaged = bytearray(shard.read_bytes())
    damaged[5] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(StorageError, match=r"tokens/c\.0\.0 holds other tokens than this plan"):
        actstore.extract(actstore.plan(**fields))


def test_rows_in_the_order_of_a_seed_hold_the_same_sequences(fields: Fields, tmp_path: Path) -> None:
    actstore.extract(actstore.plan(**fields))
    actstore.extract(actstore.plan(**fields | {"seed": 7, "out": str(tmp_path / "seeded")}))
    plain, seeded = actstore.open(fields["out"]), actstore.open(str(tmp_path / "seeded"))
    order = np.random.Generator(np.random.PCG64(7)).permutation(100)
    for name in ("tokens", "lengths", "documents", "offsets"):
        assert np.array_equal(getattr(seeded, name)[:], getattr(plain, name)[:][order])
    assert torch.equal(seeded["resid_post", 1][:], plain["resid_post", 1][order])


def test_one_document_a_row(fields: Fields) -> None:
    fields |= {"packing": "document", "truncate": "right", "max_tokens": 40 * 32}
    actstore.extract(actstore.plan(**fields))
    store = actstore.open(fields["out"])
    lengths = store.lengths[:]
    assert store.plan.n_tokens == lengths.sum() < 40 * 32
    documents = store.documents[:]
    for row, length in enumerate(lengths):
        assert set(documents[row, :length]) - {-1} == {documents[row].max()}
        assert (documents[row, length:] == -1).all()


def test_events_add_up_to_the_report(fields: Fields) -> None:
    events: list[Event] = []
    run = actstore.plan(**fields, on_event=events.append)
    report = actstore.extract(run, on_event=events.append)
    segments = [event for event in events if isinstance(event, SegmentDone)]
    assert [event.n_sequences for event in events if isinstance(event, Tokenised)][-1] == 100
    assert sorted(event.segment for event in segments) == list(range(7))
    assert sum(event.nbytes for event in segments) == report.nbytes_written == run.plan.activation_nbytes
    written = sum(len(data) for name, data in files(fields["out"]).items() if "/c." in name)
    assert written == run.plan.nbytes
    assert len(files(fields["out"])) == run.plan.n_objects


def test_the_rate_of_a_report_is_that_from_the_first_segment_to_the_last_commit(fields: Fields) -> None:
    begun: list[float] = []
    done: list[float] = []

    def note(event: Event) -> None:
        assert isinstance(event, SegmentDone)
        done.append(time.perf_counter())
        begun.append(done[-1] - event.seconds_forward - event.seconds_writing)
        if len(done) == 7:
            time.sleep(2.0)  # as an executor that takes long to end

    run = actstore.plan(**fields)
    started = time.perf_counter()
    report = actstore.extract(run, on_event=note)
    assert report.seconds_running == pytest.approx(done[-1] - min(begun), abs=1.0)
    assert report.tokens_per_second == 3200 / report.seconds_running
    assert report.seconds == pytest.approx(time.perf_counter() - started, abs=1.0)
    assert report.seconds - report.seconds_running > 2.0


def test_a_failing_forward_names_the_segment(fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    from actstore.hooks.model import HookedModel

    run = HookedModel.run

    def fail(model: HookedModel, tokens: Any, hooks: Any, sink: Any) -> None:
        if len(tokens) > 1:  # not the check of a model that is loaded
            raise RuntimeError("CUDA out of memory")
        run(model, tokens, hooks, sink)

    monkeypatch.setattr(HookedModel, "run", fail)
    with pytest.raises(ExtractError, match=r"segment \d+ \(sequences \d+:\d+\) failed .* smaller batch_size"):
        actstore.extract(actstore.plan(**fields))
