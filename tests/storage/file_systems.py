"""File systems that are not like most: another disk, one without hard links. Real ones, as far as a test can have
them.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_SHIM = r"""
#include <errno.h>
#include <stdlib.h>

static int refuse(void) { errno = atoi(getenv("LINK_ERROR")); return -1; }
int link(const char *a, const char *b) { return refuse(); }
int linkat(int a, const char *b, int c, const char *d, int e) { return refuse(); }
"""


@contextmanager
def another_disk(here: Path) -> Iterator[Path]:
    """A folder on another file system than that of a path; the test is skipped where there is none."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("needs /dev/shm as a second file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="actstore-tests-") as name:
        if Path(name).stat().st_dev == here.stat().st_dev:
            pytest.skip("needs a second file system")
        yield Path(name)


def without_links(folder: Path, monkeypatch: pytest.MonkeyPatch, *, error: int) -> None:
    """New processes find that hard links fail with this error. Functions of the C library are replaced, below all of
    Python; the files for it are made in the folder.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(_SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("LINK_ERROR", str(error))
