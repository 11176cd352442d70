"""Servers whose worker processes cannot start."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("n_workers", ["1", "2"])
def test_a_worker_that_cannot_start(stores: Path, tmp_path: Path, n_workers: str) -> None:
    log = tmp_path / "log"
    executable = Path(sys.executable).parent / "actstore"
    arguments = ["--root", str(stores), "--port", "0", "--json", "--workers", n_workers]
    hidden = tmp_path / "hidden"
    # A broken package, which only the processes that serve import.
    broken = hidden / "fastapi"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken on purpose')\n")
    with log.open("w") as stderr:
        ended = subprocess.run(
            [str(executable), "serve", *arguments],
            env={"PYTHONPATH": str(hidden), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=stderr,
            timeout=300,
            check=False,
        )
    output = log.read_text()
    assert ended.returncode == 1, output
    assert "broken on purpose" in output
    assert output.rstrip().splitlines()[-1].endswith("a process of the server could not start; see above")
