"""A job has the results of a grid for each pair, in the same bytes however often it is interrupted."""

import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actstore import patching
from actstore.errors import JobError, ModelError, PlanMismatchError, StorageError
from actstore.hooks.model import HookedModel
from tests.patching.jobs.pairs_file import random_pairs, write_jsonl
from tests.workers.processes import worker_pids

TinyModel = Callable[..., Path]
LENGTHS = (9, 6, 9, 9, 6, 9, 9)
PAIRS = random_pairs(LENGTHS)


@pytest.fixture
def fields(tiny_model: TinyModel, tmp_path: Path) -> dict[str, Any]:
    """Fields of a job of 7 pairs in 3 parts, with pairs of two lengths in each of the first two."""
    return {
        "model": str(tiny_model("llama")),
        "pairs": write_jsonl(tmp_path / "pairs.jsonl", PAIRS),
        "part_size": 3,
        "out": str(tmp_path / "out"),
        "device": "cpu",
        "threads": 1,
    }


def contents(url: str) -> dict[str, bytes]:
    """The files of a result that never differ: all but the report, which has times in it."""
    fs, root = fsspec.core.url_to_fs(url)
    names = {path[len(root) :].lstrip("/"): path for path in fs.find(root)}
    return {
        name: fs.cat_file(path)
        for name, path in names.items()
        if name != "report.json" and not name.startswith("_actstore/")
    }


def lines(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    table = pq.read_table(io.BytesIO(data))
    return {name: table[name].to_numpy() for name in table.column_names}


def plain_metric(name: str, logits: Tensor, answer: int, wrong: int) -> float:
    """The metric of logits [d_vocab], by what PyTorch has for it."""
    probabilities = torch.softmax(logits.double(), -1)
    return {
        "logit_difference": float(logits[answer] - logits[wrong]),
        "logit": float(logits[answer]),
        "log_probability": float(probabilities[answer].log()),
        "probability": float(probabilities[answer]),
    }[name]


@pytest.mark.parametrize(
    ("metric", "position", "hook", "axes"),
    [
        ("logit_difference", -1, "resid_pre", ["layer", "pos"]),
        ("log_probability", 4, "z", ["layer", "head"]),
        ("probability", -2, "pattern", ["layer", "head", "dest_pos", "src_pos"]),
        ("logit", -1, "v", ["layer", "pos", "head"]),
    ],
)
def test_results_are_those_of_a_grid_for_each_pair(
    fields: dict[str, Any], metric: str, position: int, hook: str, axes: list[str]
) -> None:
    """Cells by a full forward for each of them, clean and corrupted runs by transformers alone."""
    report = patching.run_job(**fields, metric=metric, positions=position, hook=hook, axes=axes)
    model = HookedModel.from_pretrained(fields["model"], dtype="float32", device="cpu")
    plain: Any = AutoModelForCausalLM.from_pretrained(fields["model"]).eval()
    files = contents(fields["out"])
    parts = [lines(files[f"parts/0000{part}.parquet"]) for part in range(3)]
    assert [sorted(set(part["pair"].tolist())) for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    all_lines = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    values_of: dict[int, list[Tensor]] = {}
    runs = []
    for number, pair in enumerate(PAIRS):
        clean, corrupted = torch.tensor([pair["clean"]]), torch.tensor([pair["corrupted"]])
        answer, wrong = pair["answer"], pair["wrong"]
        with torch.no_grad():
            run = [
                plain_metric(metric, plain(prompt).logits[0, position], answer, wrong)
                for prompt in (clean, corrupted)
            ]
        runs.append(run)

        def measured(logits: Tensor, answer: int = answer, wrong: int = wrong) -> float:
            return plain_metric(metric, logits[0, position], answer, wrong)

        slow = patching.grid(
            model,
            corrupted,
            clean,
            measured,
            hook,
            axes,
            engine="whole rows",
        )
        here = all_lines["pair"] == number
        shape = tuple(slow.values.shape)
        for axis, index in zip(axes, np.indices(shape), strict=True):
            assert np.array_equal(all_lines[axis][here], index.ravel())
        np.testing.assert_allclose(all_lines["value"][here].reshape(shape), slow.values, atol=2e-5)
        np.testing.assert_allclose(all_lines["clean"][here], run[0], atol=2e-5)
        np.testing.assert_allclose(all_lines["corrupted"][here], run[1], atol=2e-5)
        effect = all_lines["effect"][here]
        if run[0] == run[1]:  # the prompts differ only behind the position of the metric
            assert np.isnan(effect).all()
        else:
            expected = slow.values.ravel() - run[1]
            np.testing.assert_allclose(effect * (run[0] - run[1]), expected, atol=5e-5)
        values_of.setdefault(len(pair["clean"]) if "pos" in " ".join(axes) else 0, []).append(slow.values)
    means = {"summary": 0} if list(values_of) == [0] else {"summary-6": 6, "summary-9": 9}
    for name, length in means.items():
        mean = patching.PatchResult.load(Path(fields["out"], f"{name}.parquet"))
        np.testing.assert_allclose(mean.values, torch.stack(values_of[length]).mean(0), atol=2e-5)
        assert {f"{name}.html", f"{name}.png"} <= files.keys()
    assert report.summaries == {name: len(values_of[length]) for name, length in means.items()}
    assert (report.clean, report.corrupted) == pytest.approx(np.mean(runs, axis=0).tolist(), abs=2e-5)
    assert report.engines == {"packed rows": 7}
    assert 0 <= report.noise_floor < 1e-4
    assert report.n_cells == len(all_lines["value"])
    assert report.pairs_per_second > 0


def test_positions_of_means_have_the_tokens_that_all_prompts_share(fields: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(fields["model"])
    begin, noun, end = (tokenizer.encode(text) for text in ("My lord <i>", " I came", "$&"))
    shared = [*begin, 40, *noun, *end]
    pairs = [
        {
            "clean": [*begin, 41, *noun, *end],
            "corrupted": [*begin, token, *noun, *end],
            "answer": 5,
            "wrong": 6,
        }
        for token in (50, 51, 52, 50)
    ]
    fields |= {"pairs": write_jsonl(Path(fields["pairs"]), pairs)}
    hooks: list[dict[str, Any]] = [{}, {"hook": "pattern", "axes": "layer,dest_pos,src_pos"}]
    expected = [f"{position}: {tokenizer.decode(token)}" for position, token in enumerate(shared)]
    expected[len(begin)] = str(len(begin))  # where the prompts differ
    for number, more in enumerate(hooks):
        out = f"{fields['out']}-{number}"
        patching.run_job(**fields | more | {"out": out})
        mean = patching.PatchResult.load(Path(out, "summary.parquet"))
        layers, *positions = mean.axes
        assert layers.labels == ("0", "1", "2")
        assert positions
        assert [list(axis.labels) for axis in positions] == [expected] * len(positions)


def test_an_interrupted_job_goes_on_and_ends_in_the_same_bytes(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    whole = patching.run_job(**fields | {"out": str(tmp_path / "whole")})

    def interrupt(event: patching.PartDone) -> None:
        if event.part == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patching.run_job(**fields, on_event=interrupt)
    before = contents(fields["out"])
    assert "parts/00000.parquet" in before
    assert "summary-9.parquet" not in before
    (tmp_path / "out/parts/00001.parquet").unlink(missing_ok=True)
    done: list[int] = []
    report = patching.run_job(**fields, on_event=lambda event: done.append(event.part))
    assert 0 not in done
    assert 1 in done
    assert report.n_parts_before == 3 - len(done)
    assert contents(fields["out"]) == contents(str(tmp_path / "whole"))
    assert report.clean == whole.clean
    # Once it is complete, there is nothing to do, and the report is the one that was stored.
    assert patching.run_job(**fields, on_event=lambda event: done.append(-1)) == report
    assert -1 not in done
    assert json.loads(Path(fields["out"], "report.json").read_text()) == report.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "logit"}, "metric is logit_difference there, logit was asked for"),
        ({"limit": 6}, "n_pairs is 7 there, 6 was asked for; pairs_sha256 is"),
        ({"hook": "z"}, r"hook is hook_resid_pre there, attn\.hook_z was asked for"),
        ({"part_size": 4}, "part_size is 3 there, 4 was asked for"),
        ({"threads": 2}, "threads is 1 there, 2 was asked for"),
    ],
)
def test_the_folder_of_another_job_is_refused(
    fields: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    patching.run_job(**fields)
    before = contents(fields["out"])
    with pytest.raises(PlanMismatchError, match=message):
        patching.run_job(**fields | change)
    assert contents(fields["out"]) == before


def test_other_weights_are_another_job(fields: dict[str, Any], tiny_model: TinyModel, tmp_path: Path) -> None:
    planned = patching.plan_job(**fields)
    patching.run_job(planned)
    copy = tmp_path / "model"
    shutil.copytree(fields["model"], copy)
    assert patching.plan_job(**fields | {"model": str(copy)}).pending == ()  # the same, elsewhere
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    with pytest.raises(PlanMismatchError, match=r"model is crc32c:\w+ there, crc32c:\w+ was asked for"):
        patching.plan_job(**fields | {"model": str(copy)})
    moved = planned.job.model_copy(update={"model": str(copy), "out": str(tmp_path / "other")})
    changed = patching.plan_job(moved)
    shutil.copy(Path(fields["model"], "model.safetensors"), copy)
    with pytest.raises(ModelError, match="use the same model files everywhere"):
        patching.run_job(changed)


def test_what_is_left_of_results_is_not_taken_for_them(fields: dict[str, Any]) -> None:
    patching.run_job(**fields)
    Path(fields["out"], "report.json").unlink()
    part = Path(fields["out"], "parts/00001.parquet")
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"parts/00001\.parquet is damaged: .*; delete it"):
        patching.run_job(**fields)
    Path(fields["out"], "job.json").unlink()
    with pytest.raises(StorageError, match=r"holds parts and no job\.json"):
        patching.run_job(**fields)
    shutil.rmtree(Path(fields["out"], "parts"))
    Path(fields["out"], "report.json").write_text("{}")
    with pytest.raises(StorageError, match=r"holds its report and no job\.json"):
        patching.run_job(**fields)


def test_what_happens_between_planning_and_running_counts(fields: dict[str, Any]) -> None:
    """Another process may have run another job in the folder, or this one, with the threads of its machine."""
    planned = patching.plan_job(**fields)
    patching.run_job(**fields, limit=2)
    with pytest.raises(PlanMismatchError, match="n_pairs is 2 there, 7 was asked for"):
        patching.run_job(planned)
    shutil.rmtree(fields["out"])
    other_threads = torch.get_num_threads() + 1
    planned = patching.plan_job(**fields | {"threads": None})
    whole = patching.run_job(**fields | {"threads": other_threads})
    for name in ("report.json", "parts/00001.parquet"):
        Path(fields["out"], name).unlink()
    done: list[tuple[int, int]] = []
    report = patching.run_job(
        planned, on_event=lambda event: done.append((event.part, torch.get_num_threads()))
    )
    assert done == [(1, other_threads)]
    assert (report.clean, report.n_parts_before) == (whole.clean, 2)


def test_a_job_goes_on_with_the_threads_that_it_began_with(fields: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the machine has that continues it; and the process has its own number again afterwards."""
    before = torch.get_num_threads()
    fields |= {"threads": before + 1}
    patching.run_job(**fields | {"out": str(tmp_path / "whole")})
    patching.run_job(**fields)
    for name in ("report.json", "parts/00001.parquet", "summary-6.parquet"):
        Path(fields["out"], name).unlink()
    during: list[int] = []
    again = fields | {"threads": None}
    patching.run_job(**again, on_event=lambda _: during.append(torch.get_num_threads()))
    assert during == [before + 1]
    assert torch.get_num_threads() == before
    assert contents(fields["out"]) == contents(str(tmp_path / "whole"))


def test_a_planned_job_takes_only_resources(fields: dict[str, Any]) -> None:
    planned = patching.plan_job(**fields)
    with pytest.raises(JobError, match="metric was given for a job that is planned already"):
        patching.run_job(planned, metric="logit")
    with pytest.raises(JobError, match="executor 'dask' is not known; choose one of inline, process, ray"):
        patching.run_job(planned, executor="dask")


def test_an_estimate_stores_nothing(fields: dict[str, Any]) -> None:
    planned = patching.plan_job(**fields)
    estimated = patching.estimate_job(planned)
    assert estimated.seconds_left > estimated.seconds > 0
    assert estimated.engine == "packed rows"
    assert not Path(fields["out"]).exists()


def test_results_on_s3_are_those_on_disk(fields: dict[str, Any], s3_url: str) -> None:
    patching.run_job(**fields)
    done: list[int] = []

    def interrupt(event: patching.PartDone) -> None:
        done.append(event.part)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patching.run_job(**fields | {"out": s3_url}, on_event=interrupt)
    report = patching.run_job(**fields | {"out": s3_url})
    assert report.n_parts_before == 2
    assert contents(s3_url) == contents(fields["out"])


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """One cluster for this file. The executor joins it, since this process is connected already."""
    from actstore_workers.cluster import cluster

    with cluster(None, num_cpus=2) as connected:
        yield connected


@pytest.mark.ray
def test_ray_writes_the_same_bytes_and_runs_parts_of_killed_workers_again(
    ray: ModuleType, fields: dict[str, Any], tmp_path: Path
) -> None:
    del ray
    fields |= {
        "pairs": write_jsonl(tmp_path / "many.jsonl", random_pairs((9, 6) * 12)),
        "part_size": 2,
        "threads": 2,
    }
    patching.run_job(**fields | {"out": str(tmp_path / "inline")})
    done: list[int] = []
    killed: list[int] = []
    of_others = worker_pids()

    def kill_one(event: patching.PartDone) -> None:
        done.append(event.part)
        if len(done) == 3:
            killed.append(next(pid for pid in worker_pids() if pid not in of_others))
            os.kill(killed[0], signal.SIGKILL)

    report = patching.run_job(**fields, executor="ray", num_workers=2, on_event=kill_one)
    assert len(killed) == 1
    assert sorted(done) == list(range(12))
    assert report.n_parts_before == 0
    assert contents(fields["out"]) == contents(str(tmp_path / "inline"))
