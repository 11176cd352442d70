"""Crashes at an exact place: before, in the middle of, or after one call that changes the disk."""

import fcntl
import functools
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

EXIT_CODE = 137

_PAGE = 4096
# Index of the argument that names the changed file.
_BY_NAME = {
    "link": 1,
    "rename": 1,
    "replace": 1,
    "symlink": 1,
    "unlink": 0,
    "remove": 0,
    "mkdir": 0,
    "rmdir": 0,
}
_BY_DESCRIPTOR = (
    "write",
    "writev",
    "pwrite",
    "pwritev",
    "fsync",
    "fdatasync",
    "ftruncate",
    "posix_fallocate",
)
_AUDITED = {"open", "os.link", "os.rename", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

Moment = Literal["before", "torn", "after"]
"""``torn``: after half of the bytes of a write."""


@dataclass(frozen=True, order=True)
class Step:
    """One call that changes a store. It is named by what it does, so that it is the same in every run, in any
    order of threads.
    """

    call: str
    name: str
    """Path below the store, with a star for random parts."""
    turn: int
    """Number of equal calls before this one."""


@dataclass(frozen=True, order=True)
class Point:
    """A place at which a process crashes."""

    step: Step
    moment: Moment

    def __str__(self) -> str:
        return f"{self.moment} {self.step.call} {self.step.name} {self.step.turn}"


def points(steps: list[Step]) -> list[Point]:
    """Every state of the disk that a crash between or within these steps can leave: before each of them, after
    those that change a name (a thread's next step may be long off), and in the middle of writes. A step that failed
    (another thread had made the folder; a folder was not empty) changed nothing, and leaves no state of its own.
    """
    crashes = [Point(step, "before") for step in steps]
    crashes += [Point(step, "after") for step in steps if step.call in _BY_NAME]
    crashes += [Point(step, "torn") for step in steps if "write" in step.call]
    return sorted(crashes)


class Watch:
    """Watches all calls of this process that change files below a folder, and ends the process at one of them.

    It replaces functions of `os`, for the rest of the life of the process.
    """

    def __init__(self, root: Path, point: Point | None = None) -> None:
        self.steps: list[Step] = []
        """Steps that succeeded."""
        self.missed: list[str] = []
        """Changes that were not made by the watched functions."""
        self._root = str(root)
        self._point = point
        self._turns: Counter[tuple[str, str]] = Counter()
        self._names: dict[int, str] = {}
        self._lock = threading.Lock()
        self._inside = threading.local()
        for name, place in _BY_NAME.items():
            self._wrap(name, functools.partial(self._named, place))
        for name in _BY_DESCRIPTOR:
            self._wrap(name, lambda args, _: self._names.get(args[0]))
        self._wrap("open", self._opened)
        self._remember_descriptors()
        sys.addaudithook(self._audit)

    def _wrap(self, name: str, key_of: Callable[[Any, Any], str | None]) -> None:
        real = getattr(os, name)

        @functools.wraps(real)
        def call(*args: Any, **keywords: Any) -> Any:
            key = key_of(args, keywords)
            if key is None:
                return self._quietly(real, *args, **keywords)
            step = self._next(name, key)
            self._reach(step, "before")
            if self._point == Point(step, "torn"):
                _write_half(real, *args)
                os._exit(EXIT_CODE)
            result = self._quietly(real, *args, **keywords)
            with self._lock:
                self.steps.append(step)
            self._reach(step, "after")
            return result

        setattr(os, name, call)

    def _next(self, call: str, key: str) -> Step:
        with self._lock:
            step = Step(call, key, self._turns[call, key])
            self._turns[call, key] += 1
        return step

    def _reach(self, step: Step, moment: Moment) -> None:
        if self._point == Point(step, moment):
            os._exit(EXIT_CODE)

    def _quietly(self, real: Any, *args: Any, **keywords: Any) -> Any:
        """Make the real call, which the audit hook then ignores."""
        self._inside.now = True
        try:
            return real(*args, **keywords)
        finally:
            self._inside.now = False

    def _named(self, place: int, args: Any, keywords: Any) -> str | None:
        return self._below(args[place], keywords)

    def _below(self, path: Any, keywords: dict[str, Any]) -> str | None:
        """Path below the folder; None for other paths."""
        text = os.fsdecode(path)
        folder = keywords.get("dir_fd", keywords.get("dst_dir_fd"))
        if folder is not None:
            text = f"{os.readlink(f'/proc/self/fd/{folder}')}/{text}"  # noqa: PTH115
        if text != self._root and not text.startswith(self._root + "/"):
            return None
        return re.sub("[0-9a-f]{32}", "*", text[len(self._root) + 1 :])

    def _opened(self, args: Any, keywords: Any) -> str | None:
        flags = args[1] if len(args) > 1 else keywords["flags"]
        return self._below(args[0], keywords) if flags & _WRITES else None

    def _remember_descriptors(self) -> None:
        """Remember the name of each opened file, as writes name only its descriptor."""
        real_open, real_close = os.open, os.close

        def open_file(path: Any, flags: int, *args: Any, **keywords: Any) -> int:
            descriptor = real_open(path, flags, *args, **keywords)
            key = self._below(path, keywords)
            if key is not None:
                self._names[descriptor] = key
            return descriptor

        def close(descriptor: int) -> None:
            self._names.pop(descriptor, None)
            real_close(descriptor)

        os.open, os.close = open_file, close  # type: ignore[assignment]

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _AUDITED or getattr(self._inside, "now", False):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITES):
            return
        for path in args[:2]:
            if isinstance(path, str | bytes | os.PathLike) and self._below(path, {}) is not None:
                self.missed.append(f"{event} {os.fsdecode(path)}")


def _write_half(write: Any, descriptor: int, data: Any, *rest: Any) -> None:
    """Write half of the bytes; whole pages where the file wants them."""
    half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
        half = half[: len(half) // _PAGE * _PAGE]
    if half:
        write(descriptor, half, *rest)
