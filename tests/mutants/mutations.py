"""The list of deliberate faults: one file per package; each entry is a change of a few lines and the tests that notice
it.
"""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

LISTS: Final = Path(__file__).parent


@dataclass(frozen=True)
class Mutation:
    """A fault such as a hurried change would make."""

    name: str
    """Unique name, such as ``store/fsync-of-the-file``; the part before the slash is the package."""
    path: str
    """Path of the changed file below the root of the repository."""
    before: str
    """The text to replace, which is in the file exactly once: whole lines, or a part of one."""
    after: str
    """The text that takes its place."""
    fault: str
    """What goes wrong with it."""
    tests: tuple[str, ...]
    """Files below ``tests``, or tests in them (``storage/test_local.py::test_free_space``), some of which must fail."""
    why: str = ""
    """For faults that no test notices, the reason why they are left."""

    @property
    def package(self) -> str:
        return self.name.partition("/")[0]

    def applied(self, root: Path) -> str:
        """The changed text of the file.

        Args:
            root: the root of the repository.

        Raises:
            StaleError: the entry does not fit the file any more.
        """
        try:
            text = (root / self.path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise StaleError(f"{self.name} is stale: there is no file {self.path} any more") from error
        n_found = text.count(self.before)
        if n_found != 1:
            raise StaleError(
                f"{self.name} is stale: its text before is in {self.path} {n_found} times where once is expected; "
                "write it as the code is now, or take it out if there is no such fault any more"
            )
        return text.replace(self.before, self.after)

    def check_runs(self, root: Path) -> None:
        """Check that the changed file is valid Python. This takes longer than checking that the entry fits.

        Args:
            root: the root of the repository.

        Raises:
            StaleError: it is not valid Python.
        """
        try:
            compile(self.applied(root), self.path, "exec")
        except SyntaxError as error:
            raise StaleError(
                f"{self.name} is no fault that runs: {self.path} is no Python with it ({error})"
            ) from error

    def check_tests(self, root: Path) -> None:
        """Check that the tests it names exist.

        Args:
            root: the root of the repository.

        Raises:
            StaleError: a test does not exist.
        """
        for test in self.tests:
            file, _, function = test.partition("::")
            path = root / "tests" / file
            name = function.partition("[")[0]  # without the parameters
            defined = f"def {name}(" if name else "def test_"
            if not path.is_file() or defined not in path.read_text(encoding="utf-8"):
                raise StaleError(
                    f"{self.name} is stale: there is no test {test} any more; name those that notice"
                )


class StaleError(Exception):
    """An entry of the list does not fit the code any more."""


def read(folder: Path = LISTS) -> list[Mutation]:
    """All entries, package by package.

    Args:
        folder: a folder with one ``*.toml`` per package, named after it.

    Raises:
        ValueError: an entry has an unknown field or lacks one, or two have one name.
    """
    mutations: list[Mutation] = []
    for file in sorted(folder.glob("*.toml")):
        entries: list[dict[str, Any]] = tomllib.loads(file.read_text(encoding="utf-8"))["mutation"]
        mutations += [_parsed(file.stem, entry) for entry in entries]
    names = [mutation.name for mutation in mutations]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} is there twice; each fault has a name of its own")
    return mutations


def _parsed(package: str, entry: dict[str, Any]) -> Mutation:
    known = {field.name for field in fields(Mutation)}
    name = f"{package}/{entry.get('name')}"
    if entry.keys() - known or {"name", "path", "before", "after", "fault", "tests"} - entry.keys():
        raise ValueError(
            f"{name} has the fields {sorted(entry)}; known are {sorted(known)}, all but why are needed"
        )
    # The text begins behind the opening quotes, and ends before the closing ones; the line ends there belong to the
    # list.
    texts = {side: entry[side].removeprefix("\n").removesuffix("\n") for side in ("before", "after")}
    return Mutation(**{**entry, **texts, "name": name, "tests": tuple(entry["tests"])})
