"""The list of deliberate faults fits the code, and its runner reports what happened with each."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.mutations import Mutation, StaleError, read
from tests.mutants.run import ROOT, Copy, chosen, run, table

PACKAGES = {
    *("tokens", "hooks", "storage", "store", "extraction", "loader", "analysis", "query"),
    *("integrations", "cli", "workers", "patching", "generating", "recall"),
}


def test_no_entry_is_stale() -> None:
    """Whoever changes a line of an entry updates the entry, or removes it."""
    mutations = read()
    assert {mutation.package for mutation in mutations} == PACKAGES
    for mutation in mutations:
        folder = (
            "workers/actstore_workers/" if mutation.package == "workers" else f"actstore/{mutation.package}/"
        )
        assert mutation.path.startswith(folder), mutation.name
        assert mutation.applied(ROOT) != (ROOT / mutation.path).read_text(encoding="utf-8"), mutation.name
        mutation.check_tests(ROOT)


_TESTS = """
from actstore.sizes import larger

def test_larger():
    assert larger(1, 2) == larger(2, 1) == 2

def test_equal():
    assert larger(3, 3) == 3
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A package of one function, and its tests."""
    files = {
        "actstore/__init__.py": "",
        "actstore/sizes.py": "def larger(a: int, b: int) -> int:\n    return a if a > b else b\n",
        "workers/empty.py": "",
        "tests/test_sizes.py": _TESTS,
    }
    for name, text in files.items():
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_text(text)
    return tmp_path / "repository"


def fault(
    name: str, after: str, *, before: str = "a > b", tests: tuple[str, ...] = ("test_sizes.py",)
) -> Mutation:
    return Mutation(f"sizes/{name}", "actstore/sizes.py", before, after, "numbers are mixed up", tests)


def test_what_became_of_each(repository: Path, tmp_path: Path) -> None:
    """Faults that leave size and time of the file unchanged are noticed, too; hanging counts as noticing."""
    faults = [fault("killed", "a < b"), fault("survives", "a >= b")]
    hanging = fault("hangs", "a > b or [0 for _ in iter(int, 1)]")
    with contextlib.closing(Copy(repository, tmp_path / "copy", ())) as copy:
        results = list(run(copy, faults))
        results += run(copy, [hanging], limit_s=0.5, is_known_to_pass=True)
    assert [result.outcome for result in results] == ["killed", "survived", "timeout"]
    assert results[0].by == "test_sizes.py::test_larger"
    report = table(results)
    assert report.startswith("sizes            2 of 3      67%\nall              2 of 3      67%\n")
    assert report.endswith("not noticed: sizes/survives (actstore/sizes.py): numbers are mixed up")
    for tree in (repository, copy.folder):
        assert "a if a > b else b" in (tree / "actstore/sizes.py").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (fault("gone", "a < b", before="a is b"), "is in actstore/sizes.py 0 times where once is expected"),
        (fault("twice", "c", before="a"), "is in actstore/sizes.py 4 times where once is expected"),
        (fault("no Python", "a >"), "is no fault that runs"),
        (
            fault("no test", "a < b", tests=("test_sizes.py::test_smaller",)),
            "there is no test test_sizes.py::test_sm",
        ),
        (fault("no file", "a < b", tests=("test_other.py",)), "there is no test test_other.py any more"),
        (
            fault("import", "1 / 0", before="def larger(a: int", tests=("test_sizes.py",)),
            "is no fault that runs",
        ),
    ],
)
def test_entries_that_do_not_fit_are_told(
    repository: Path, tmp_path: Path, changed: Mutation, message: str
) -> None:
    with pytest.raises(StaleError, match=message):
        list(run(Copy(repository, tmp_path / "copy", ()), [changed]))


def test_tests_that_fail_anyway_show_nothing(repository: Path, tmp_path: Path) -> None:
    with (repository / "tests/test_sizes.py").open("a") as file:
        file.write("\n\ndef test_wrong():\n    assert larger(1, 2) == 1\n")
    with (
        contextlib.closing(Copy(repository, tmp_path / "copy", ())) as copy,
        pytest.raises(StaleError, match="tests fail without any fault"),
    ):
        list(run(copy, [fault("killed", "a < b")]))


def test_a_part_of_the_list() -> None:
    mutations = read()
    assert {mutation.package for mutation in chosen(mutations, "store,cli")} == {"store", "cli"}
    assert [mutation.name for mutation in chosen(mutations, "storage/file-not")] == [
        "storage/file-not-synced"
    ]
    assert [mutation.path for mutation in chosen(mutations, "durable.py")] == [
        "actstore/storage/durable.py"
    ] * 4
    assert chosen(mutations, None) == mutations
    assert chosen(mutations, "no such fault") == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "one"}, r"one/one has the fields \['name'\]"),
        (
            dict.fromkeys(("name", "path", "before", "after", "fault", "tests", "reason"), "x"),
            "one/x has the fields",
        ),
    ],
)
def test_a_list_that_is_none(tmp_path: Path, entry: dict[str, str], message: str) -> None:
    fields = "".join(f"{name} = {json.dumps(value)}\n" for name, value in entry.items())
    (tmp_path / "one.toml").write_text(f"[[mutation]]\n{fields}")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_the_command_says_what_there_is_not() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants.run", "--only", "no such fault"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.startswith("there is no fault of 'no such fault'")
