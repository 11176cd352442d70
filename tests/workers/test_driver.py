"""The ray executor on a real Ray writes the same bytes as inline, whatever happens to workers and driver. Without
failures, `tests/test_main_job.py` compares them.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import actstore
from actstore.errors import ModelError, SetAsideError
from actstore.extraction.events import Event, SegmentDone
from actstore.extraction.pool import pace
from tests.workers.processes import worker_pids

pytestmark = pytest.mark.ray
Fields = dict[str, Any]


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """One cluster for this file. An executor joins it, since this process is connected already."""
    from actstore_workers.cluster import cluster

    with cluster(None, num_cpus=2) as connected:
        yield connected


def files(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "partial" not in path.parts
    }


@pytest.mark.faults
def test_killed_workers_are_replaced(ray: ModuleType, fields: Fields, tmp_path: Path) -> None:
    del ray
    fields |= {"max_tokens": 1000 * 32}
    inline = tmp_path / "inline"
    actstore.extract(actstore.plan(**fields | {"out": str(inline)}))
    killed: list[int] = []
    done: list[int] = []
    of_others = worker_pids()  # workers of an earlier test may not have ended yet

    def kill_one(event: Event) -> None:
        assert isinstance(event, SegmentDone)
        done.append(event.segment)
        if len(done) in (5, 25):
            pid = next(pid for pid in worker_pids() if pid not in of_others)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    actstore.extract(actstore.plan(**fields), executor="ray", num_workers=2, on_event=kill_one)
    assert len(killed) == 2
    assert sorted(done) == list(range(63))
    assert files(fields["out"]) == files(inline)


def test_prompts_of_different_lengths_are_stored_in_the_same_bytes(
    ray: ModuleType, fields: Fields, tmp_path: Path
) -> None:
    """Batches that are sorted by length depend on the segment alone, not on who computes it or when."""
    del ray
    fields |= {"documents": "line", "packing": "document", "pad_token": "eos", "positions": "last:2"}
    fields |= {"max_tokens": 150 * 32, "truncate": "right"}
    inline = tmp_path / "inline"
    actstore.extract(actstore.plan(**fields | {"out": str(inline)}))
    actstore.extract(actstore.plan(**fields), executor="ray", num_workers=2)
    assert len(set(actstore.open(fields["out"]).lengths[:].tolist())) > 5
    assert files(fields["out"]) == files(inline)


def test_segments_of_a_stopped_worker_are_given_to_others(
    ray: ModuleType, fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    del ray
    monkeypatch.setattr(pace, "FLOOR_S", 2.0)
    monkeypatch.setattr(pace, "START_FLOOR_S", 2.0)  # in case the stopped worker has segment 0
    fields |= {"max_tokens": 400 * 32}
    done: list[int] = []
    stopped: list[int] = []
    of_others = worker_pids()

    def stop_one(event: Event) -> None:
        assert isinstance(event, SegmentDone)
        done.append(event.segment)
        if len(done) == 5:
            # Stop the worker that did these segments and has more under way; the other one may still be starting.
            own = [psutil.Process(pid) for pid in worker_pids() if pid not in of_others]
            stopped.append(max(own, key=lambda process: process.io_counters().write_chars).pid)
            os.kill(stopped[0], signal.SIGSTOP)

    report = actstore.extract(actstore.plan(**fields), executor="ray", num_workers=2, on_event=stop_one)
    assert sorted(done) == list(range(25))
    assert report.n_tokens_computed <= report.n_tokens == 400 * 32
    assert actstore.verify(fields["out"]).is_complete
    deadline = time.monotonic() + 60  # Ray waits some seconds before it kills a process that does not answer
    while stopped[0] in worker_pids():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_worker_that_cannot_start_is_told_as_it_is(ray: ModuleType, fields: Fields, tmp_path: Path) -> None:
    del ray
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(fields["model"], copy)
    run = actstore.plan(**fields | {"model": str(copy)})
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    with pytest.raises(ModelError, match="the weights of .* on this machine are crc32c") as caught:
        actstore.extract(run, executor="ray", num_workers=1)
    assert "\n" not in str(caught.value)


def test_a_segment_that_always_fails_is_set_aside(ray: ModuleType, fields: Fields) -> None:
    del ray
    run = actstore.plan(**fields)
    # A folder is where a shard must be written, so each attempt at it fails.
    Path(fields["out"], "acts/blocks.1.hook_mlp_out/c.4.0.0").mkdir(parents=True)
    with pytest.raises(
        SetAsideError, match=r"^1 segment failed 3 times and is missing, all others are done \(4: "
    ):
        actstore.extract(run, executor="ray", num_workers=1)


def test_no_cluster_at_the_address() -> None:
    code = (
        "import sys; from actstore_workers.cluster import cluster\n"
        "from actstore.errors import ExtractError\n"
        "try:\n"
        "    with cluster('127.0.0.1:1'): pass\n"
        "except ExtractError as error:\n"
        "    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("there is no Ray cluster to join at '127.0.0.1:1'")


@pytest.mark.faults
def test_the_driver_is_killed_and_the_same_command_goes_on(
    fields: Fields, options: list[str], tmp_path: Path
) -> None:
    fields |= {"max_tokens": 1000 * 32}
    options += ["--max-tokens", str(1000 * 32)]
    inline = tmp_path / "inline"
    actstore.extract(actstore.plan(**fields | {"out": str(inline)}))
    command = [sys.executable, "-m", "actstore_workers.extract", *options, "--num-workers", "2"]
    commits = Path(fields["out"], "_actstore/runs/0000/commits")
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 180
    while len(list(commits.glob("*.json"))) < 3:
        # Looking more often would take the core that the workers need.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert process.poll() is None
        assert time.monotonic() < deadline
    workers = worker_pids()
    assert workers
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Workers notice that their driver is gone; until then they may still commit.
    living = []
    for pid in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            living.append(psutil.Process(pid))
    assert psutil.wait_procs(living, timeout=180)[1] == []
    n_before = len(list(commits.glob("*.json")))
    assert n_before < 63
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"63 segments, {n_before} of them by earlier attempts" in done.stdout
    assert files(fields["out"]) == files(inline)
