"""Packages that a few tests need, and that would disturb the environment of the others."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_CACHE = Path(__file__).parents[1] / ".cache"


def package(requirement: str) -> Path:
    """A folder for PYTHONPATH with one package of PyPI and without its dependencies; made once, then kept in
    ``.cache``.

    Raises:
        OSError: the package cannot be fetched.
    """
    folder = _CACHE / requirement.replace("==", "-")
    if not folder.exists():
        _CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as name:
            made = Path(name) / "package"
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                str(made),
                requirement,
            ]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(f"{requirement} cannot be fetched: {done.stderr.strip()[-200:]}")
            try:
                # Complete or not at all: another process may be making it, too, and the first one wins.
                os.rename(made, folder)  # noqa: PTH104 - Path.rename would do the same
            except OSError:
                if not folder.exists():
                    raise
    return folder
