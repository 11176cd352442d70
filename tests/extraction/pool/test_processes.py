"""Worker processes write the same bytes as inline, whatever happens to them."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import actstore
from actstore.errors import ModelError, SetAsideError
from actstore.extraction.computing.worker import WorkerSpec
from actstore.extraction.events import Event, SegmentDone
from actstore.extraction.pool import pace, processes
from actstore.extraction.pool.processes import ProcessFleet

Fields = dict[str, Any]


def files(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "partial" not in path.parts
    }


def worker_pids() -> list[int]:
    """Of the children of this process, which also has servers of other tests, the workers."""
    children = multiprocessing.active_children()
    return [child.pid for child in children if child.name == "actstore-worker" and child.pid is not None]


@pytest.fixture
def inline(fields: Fields, tmp_path: Path) -> dict[str, bytes]:
    """What the inline executor writes."""
    fields |= {"max_tokens": 400 * 32}
    actstore.extract(actstore.plan(**fields | {"out": str(tmp_path / "inline")}))
    return files(tmp_path / "inline")


def test_two_processes_write_the_bytes_of_one(fields: Fields, inline: dict[str, bytes]) -> None:
    done: list[int] = []

    def on_event(event: Event) -> None:
        assert isinstance(event, SegmentDone)
        done.append(event.segment)

    actstore.extract(actstore.plan(**fields), executor="process", num_workers=2, on_event=on_event)
    assert sorted(done) == list(range(25))
    assert files(fields["out"]) == inline
    assert worker_pids() == []


def test_killed_and_stopped_workers_are_replaced(
    fields: Fields, inline: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "FLOOR_S", 2.0)
    monkeypatch.setattr(pace, "START_FLOOR_S", 2.0)
    monkeypatch.setattr(pace, "ALONE_S", 2.0)
    done: list[int] = []
    lost: list[int] = []

    def on_event(event: Event) -> None:
        assert isinstance(event, SegmentDone)
        done.append(event.segment)
        if len(done) in (3, 12):
            pid = next(pid for pid in worker_pids() if pid not in lost)
            os.kill(pid, signal.SIGKILL if len(done) == 3 else signal.SIGSTOP)
            lost.append(pid)

    actstore.extract(actstore.plan(**fields), executor="process", num_workers=1, on_event=on_event)
    assert len(lost) == 2
    assert sorted(done) == list(range(25))
    assert files(fields["out"]) == inline


def test_a_worker_that_cannot_start_is_told_as_it_is(fields: Fields, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(fields["model"], copy)
    run = actstore.plan(**fields | {"model": str(copy)})
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    with pytest.raises(ModelError, match=r"the weights of .* on this machine are crc32c") as caught:
        actstore.extract(run, executor="process")
    assert "\n" not in str(caught.value)


def test_a_segment_that_always_fails_is_set_aside(fields: Fields) -> None:
    """The others are committed, the command says which one is missing, and goes on once the cause is gone."""
    run = actstore.plan(**fields)
    # A folder is where a shard must be written, so each attempt at it fails.
    obstacle = Path(fields["out"], "acts/blocks.1.hook_mlp_out/c.4.0.0")
    obstacle.mkdir(parents=True)
    with pytest.raises(
        SetAsideError, match=r"^1 segment failed 3 times and is missing, .* \(4: .*c\.4\.0\.0"
    ):
        actstore.extract(run, executor="process")
    assert actstore.open(fields["out"]).n_committed == 6
    obstacle.rmdir()
    report = actstore.extract(actstore.plan(**fields), executor="process")
    assert report.n_segments_before == 6
    assert actstore.verify(fields["out"]).is_complete


def test_workers_end_with_the_process_that_started_them(fields: Fields, options: list[str]) -> None:
    del fields
    code = (
        "import sys\n"
        "from actstore.cli.main import run\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(run(sys.argv[1:]))\n"
    )
    script = Path(options[-1]).parent / "main.py"
    script.write_text(code)
    command = [sys.executable, str(script), "extract", "--executor", "process", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while not workers:
        assert time.monotonic() < deadline
        assert process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == []


def test_each_process_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that this process may use, the one with the fewest workers; nothing is started here."""
    started: list[str] = []

    class Process:
        def __init__(self, *, args: tuple[Any, ...], **_options: Any) -> None:
            started.append(args[1]["CUDA_VISIBLE_DEVICES"])

        def start(self) -> None:
            pass

    monkeypatch.setattr(processes, "_n_gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    fleet = ProcessFleet(WorkerSpec("a store", "a model"), 3)
    monkeypatch.setattr(fleet._context, "Process", Process)
    for _ in range(3):
        fleet.add()
    assert started == ["5", "7", "5"]
