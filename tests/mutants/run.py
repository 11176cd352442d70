"""``make mutants``: put one deliberate fault after the other into a copy of the repository, and run the tests that
should notice it.

``ONLY=store`` runs the faults of a package, ``ONLY=durable.py`` those of a file, ``ONLY=store/file`` those whose name
begins so; several choices are separated by commas.
"""

import argparse
import contextlib
import json
import os
import py_compile
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from tests.mutants.mutations import Mutation, StaleError, read

ROOT: Final = Path(__file__).parents[2]
WANTED: Final = 0.9
"""Share of the faults that must be noticed."""
LIMIT_S: Final = 300.0
"""Seconds for the tests of one fault. Tests that hang have noticed it."""
_BASELINE_S: Final = 3600.0
LIBRARIES: Final = (
    *("numpy", "torch", "transformers", "transformers.models.llama.modeling_llama"),
    *(
        "transformers.models.gpt2.modeling_gpt2",
        "zarr",
        "pyarrow.parquet",
        "pydantic",
        "hypothesis",
        "fsspec",
    ),
)
"""Libraries that many tests import."""
_PLUGINS: Final = ("no:cacheprovider", "xdist.plugin", "_hypothesis_pytestplugin")
"""Pytest plugins that tests need, or that must be off since they write into the copy."""
_NOT_COPIED: Final = (".*", "__pycache__", "actstore-demo", "node_modules")
_FAILED: Final = 1
"""Exit code of pytest if tests failed. Other codes mean that tests could not be run."""

Outcome = Literal["killed", "timeout", "survived"]


@dataclass(frozen=True)
class Result:
    """The result of trying one fault."""

    name: str
    package: str
    path: str
    fault: str
    outcome: Outcome
    seconds: float
    by: str
    """The test that noticed the fault."""
    why: str

    @property
    def is_noticed(self) -> bool:
        return self.outcome != "survived"


class Copy:
    """A copy of the repository in which tests run. The checkout itself is never changed."""

    def __init__(self, root: Path, folder: Path, libraries: Sequence[str] = LIBRARIES) -> None:
        """
        Args:
            root: the root of the repository.
            folder: the folder for the copy; it must not exist yet.
            libraries: libraries that are imported once for all runs of tests.
        """
        shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*_NOT_COPIED), symlinks=True)
        self.folder = folder
        self._libraries = libraries
        sources = os.pathsep.join([str(folder), str(folder / "workers")])
        # Put before the paths of an editable installation, which lead to the checkout; processes of tests inherit it.
        self._environment = {
            **os.environ,
            "PYTHONPATH": sources,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # installed plugins take seconds to import
            "HF_HUB_OFFLINE": "1",  # set before transformers is imported
        }
        self._warm: subprocess.Popen[bytes] | None = None
        # Compiled once. Python detects changes by time and size of a file, and a fault can leave both.
        for file in (*(folder / "actstore").rglob("*.py"), *(folder / "workers").rglob("*.py")):
            py_compile.compile(str(file), doraise=True)

    @contextlib.contextmanager
    def changed(self, mutation: Mutation) -> Iterator[None]:
        """Put the fault into the copy until the context ends.

        Raises:
            StaleError: the entry does not fit the file.
        """
        file = self.folder / mutation.path
        text = mutation.applied(self.folder)
        original = file.read_bytes()
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            compiled.unlink()
        file.write_text(text, encoding="utf-8")
        try:
            yield
        finally:
            file.write_bytes(original)

    def pytest(self, tests: Sequence[str], *options: str, limit_s: float) -> tuple[int | None, str]:
        """Run tests; returns the exit code of pytest, None if they took too long, and what was printed.

        Args:
            tests: names of tests below ``tests``.
            options: options of pytest.
            limit_s: the most seconds that they may take.
        """
        plugins = [word for name in _PLUGINS for word in ("-p", name)]
        arguments = ["-q", *plugins, *options, *(f"tests/{test}" for test in tests)]
        warm = self._warm or self._started()
        assert warm.stdin is not None
        assert warm.stdout is not None
        output = self.folder.with_name("printed")
        warm.stdin.write(json.dumps({"arguments": arguments, "output": str(output)}).encode() + b"\n")
        process, is_late = int(warm.stdout.readline()), False
        if not select.select([warm.stdout], [], [], limit_s)[0]:
            is_late = True
            os.killpg(process, signal.SIGKILL)
        code = int(warm.stdout.readline())
        return None if is_late else code, output.read_text(errors="replace")

    def _started(self) -> "subprocess.Popen[bytes]":
        self._warm = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py")), *self._libraries],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # otherwise a line that is waited for could be in a buffer
        )
        return self._warm

    def close(self) -> None:
        """End the process that runs the tests."""
        if self._warm is not None:
            with self._warm as warm:
                warm.kill()
            self._warm = None


def chosen(mutations: Sequence[Mutation], only: str | None) -> list[Mutation]:
    """Choose the faults of a package (``store``), of a file (``durable.py``), or whose name begins so.

    Several choices are separated by commas; None chooses all.
    """
    if not only:
        return list(mutations)

    def is_meant(mutation: Mutation, text: str) -> bool:
        is_of_file = mutation.path.endswith(f"/{text}")
        return mutation.package == text or is_of_file or ("/" in text and mutation.name.startswith(text))

    return [mutation for mutation in mutations if any(is_meant(mutation, text) for text in only.split(","))]


def run(
    copy: Copy, mutations: Sequence[Mutation], *, limit_s: float = LIMIT_S, is_known_to_pass: bool = False
) -> Iterator[Result]:
    """Try one fault after the other.

    Args:
        copy: the copy of the repository.
        mutations: the faults.
        limit_s: the most seconds for the tests of one fault.
        is_known_to_pass: whether the tests have just passed without any fault; otherwise they are run first.

    Raises:
        StaleError: an entry does not fit the code, or its tests do not pass without it, or do not run with it.
    """
    for mutation in mutations:
        mutation.check_runs(copy.folder)
        mutation.check_tests(copy.folder)
    if not is_known_to_pass:
        tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
        code, printed = copy.pytest(tests, limit_s=_BASELINE_S)
        if code != 0:
            raise StaleError(f"tests fail without any fault, so nothing would be shown by them:\n{printed}")
    for mutation in mutations:
        yield _tried(copy, mutation, limit_s)


def _tried(copy: Copy, mutation: Mutation, limit_s: float) -> Result:
    started = time.monotonic()
    with copy.changed(mutation):
        code, printed = copy.pytest(mutation.tests, "-x", limit_s=limit_s)
        if code is None:  # a machine can be suspended for a while, too
            code, printed = copy.pytest(mutation.tests, "-x", limit_s=limit_s)
    outcome: Outcome = "timeout" if code is None else "survived" if code == 0 else "killed"
    if code not in (None, 0, _FAILED):
        raise StaleError(f"{mutation.name}: its tests do not run with it (exit code {code}):\n{printed}")
    failed = [line for line in printed.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    by = failed[0].split(" ", 1)[1].partition(" - ")[0].removeprefix("tests/") if failed else ""
    seconds = round(time.monotonic() - started, 1)
    return Result(
        mutation.name, mutation.package, mutation.path, mutation.fault, outcome, seconds, by, mutation.why
    )


def table(results: Sequence[Result]) -> str:
    """A table of how many faults of each package were noticed, and the list of those that were not."""
    by_package: dict[str, list[Result]] = {}
    for result in results:
        by_package.setdefault(result.package, []).append(result)
    rows = [(package, *_counts(package_results)) for package, package_results in sorted(by_package.items())]
    rows.append(("all", *_counts(results)))
    lines = [f"{package:<14}{n_noticed:>4} of {n:<4}{share:>6.0%}" for package, n_noticed, n, share in rows]
    for result in results:
        if not result.is_noticed:
            reason = f"\n    left so: {result.why}" if result.why else ""
            lines.append(f"not noticed: {result.name} ({result.path}): {result.fault}{reason}")
    return "\n".join(lines)


def _counts(results: Sequence[Result]) -> tuple[int, int, float]:
    n_noticed = sum(result.is_noticed for result in results)
    return n_noticed, len(results), n_noticed / len(results)


def main(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Return 0 if enough of the faults were noticed, 1 if not, 2 if the list does not fit the code."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument(
        "--only",
        default=environment.get("ONLY"),
        help="packages, files or beginnings of names, joined by commas",
    )
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for the tests of one fault")
    parser.add_argument(
        "--passing", action="store_true", help="the tests have just passed; do not run them first"
    )
    given = parser.parse_args(arguments)
    mutations = chosen(read(), given.only)
    if not mutations:
        print(
            f"there is no fault of {given.only!r}; give packages, files or names as tests/mutants/*.toml has them"
        )
        return 2
    results = []
    with tempfile.TemporaryDirectory(prefix="actstore-mutants-") as folder:
        copy = Copy(ROOT, Path(folder) / "copy")
        try:
            for result in run(copy, mutations, limit_s=given.limit, is_known_to_pass=given.passing):
                results.append(result)
                by = f" by {result.by}" if result.by else ""
                print(f"{result.outcome:<9}{result.seconds:>6.1f} s  {result.name}{by}", flush=True)
        except StaleError as error:
            print(error)
            return 2
        finally:
            copy.close()
            if given.json is not None:
                written = json.dumps([asdict(result) for result in results], indent=2) + "\n"
                given.json.write_text(written, encoding="utf-8")
    print(f"\n{table(results)}")
    return 0 if _counts(results)[2] >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
