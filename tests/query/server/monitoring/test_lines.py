"""Lines of logs that no reader takes."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actstore.query.server.monitoring.lines import _MAX_NBYTES, LineWriter
from tests.query.running import Running
from tests.query.server.test_limits import get

LINE = b"x" * 1023 + b"\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def dropped_line(n_dropped: int) -> bytes:
    return b"dropped %d\n" % n_dropped


@pytest.mark.parametrize("blocks", [True, False])
def test_a_full_pipe(pipe: tuple[int, int], blocks: bool) -> None:
    """A writer never waits; lines without room are counted, and reported once there is room again."""
    out, into = pipe
    os.set_blocking(into, blocks)
    n_counted = 0

    def count(n_lines: int) -> None:
        nonlocal n_counted
        n_counted += n_lines

    writer = LineWriter(into, dropped_line, count)
    n_lines = 2 * _MAX_NBYTES // len(LINE)
    for _ in range(n_lines):
        writer.write(LINE)
    assert 0 < n_counted < n_lines
    taken = b""
    while b"dropped" not in taken or taken.count(LINE) < n_lines - n_counted:
        taken += os.read(out, 1 << 16)
    lines = taken.splitlines(keepends=True)
    assert lines.count(LINE) == n_lines - n_counted
    assert sum(int(line.split()[1]) for line in lines if line.startswith(b"dropped")) == n_counted
    writer.close()
    writer.write(LINE)
    assert n_counted > n_lines - lines.count(LINE)


def test_all_is_written_at_the_end(pipe: tuple[int, int]) -> None:
    out, into = pipe
    writer = LineWriter(into, dropped_line)
    for i in range(100):
        writer.write(b"%d\n" % i)
    writer.close()
    assert os.read(out, 1 << 16).split() == [b"%d" % i for i in range(100)]


def test_a_file_that_cannot_be_written(pipe: tuple[int, int]) -> None:
    """As on a full disk, the lines are lost, and later ones are not."""
    out, into = pipe
    full = os.open("/dev/full", os.O_WRONLY)
    writer = LineWriter(full, dropped_line)
    for _ in range(3):
        writer.write(LINE)
    writer.flush()
    os.dup2(into, full)
    writer.write(b"later\n")
    writer.close()
    os.close(full)
    assert os.read(out, 1 << 16) == b"later\ndropped 3\n"


def test_a_server_whose_log_nobody_reads(stores: Path) -> None:
    executable = Path(sys.executable).parent / "actstore"
    command = [str(executable), "serve", "--root", str(stores), "--port", "0", "--json", "--access-log", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        server = Running(process, process.stdout.readline(), Path())
        size = fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        try:
            n_requests = size // 100 + 20
            for _ in range(n_requests):
                assert get(server, "/healthz")[0] == 200
            process.terminate()
            log = process.stderr.read()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert [json.loads(line)["path"] for line in log.splitlines()] == ["/healthz"] * n_requests
