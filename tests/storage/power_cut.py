"""What a power cut would leave of a folder at any moment, from the calls that changed it.

Bytes of a file last once it was synced after the last of them; a name, once the folder that it is in was synced after
it was given. Until then they may be there after the cut or not, so nothing that vouches for them may have a name.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

Call = Literal["open", "write", "fsync", "link", "replace", "mkdir"]


@dataclass(frozen=True)
class Step:
    """A call that succeeded."""

    call: Call
    path: Path
    """Path of the file or folder; the new name, if the call gives one."""
    source: Path | None = None
    """The name before."""


class Recorder:
    """Records the calls of this process below a folder, in the order in which they count: one that makes something
    last when it has returned, others when they begin.
    """

    def __init__(self, root: Path) -> None:
        self.steps: list[Step] = []
        self._root = root
        self._lock = threading.Lock()
        self._names: dict[int, Path] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """The functions of `os` are replaced by ones that note the call and make it."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "write", "close", "fsync", "link", "rename", "replace", "mkdir"):
                patch.setattr(os, name, getattr(self, f"_{name}")(getattr(os, name)))
            yield self

    def _note(self, step: Step) -> None:
        with self._lock:
            self.steps.append(step)

    def _is_below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(self._root)

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *args: Any, **options: Any) -> int:
            descriptor = real(path, flags, *args, **options)
            if self._is_below(path):
                self._names[descriptor] = Path(path)
                if flags & os.O_CREAT:
                    self._note(Step("open", Path(path)))
            return descriptor

        return call

    def _close(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            self._names.pop(descriptor, None)
            real(descriptor)

        return call

    def _write(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, data: Any) -> int:
            if descriptor in self._names:
                self._note(Step("write", self._names[descriptor]))
            return real(descriptor, data)

        return call

    def _fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            real(descriptor)
            if descriptor in self._names:
                self._note(Step("fsync", self._names[descriptor]))

        return call

    def _link(self, real: Callable[..., None]) -> Callable[..., None]:
        return self._naming("link", real)

    def _rename(self, real: Callable[..., None]) -> Callable[..., None]:
        return self._naming("replace", real)

    _replace = _rename

    def _naming(self, name: Literal["link", "replace"], real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **options: Any) -> None:
            step = Step(name, Path(target), Path(source))
            if self._is_below(target):
                self._note(step)
            try:
                real(source, target, **options)
            except OSError:
                with self._lock, contextlib.suppress(ValueError):
                    self.steps.remove(step)
                raise

        return call

    def _mkdir(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *args: Any, **options: Any) -> None:
            real(path, *args, **options)
            if self._is_below(path):
                self._note(Step("mkdir", Path(path)))

        return call


class Disk:
    """What a power cut would leave of a folder, step by step."""

    def __init__(self, root: Path) -> None:
        """
        Args:
            root: a folder that was there before.
        """
        self._root = root
        self._unsynced: set[Path] = set()
        """Files with bytes that do not last, by the name that they were written under."""
        self._written_as: dict[Path, Path] = {}
        self._names: set[Path] = {root}
        """Those that last."""
        self._new: set[Path] = set()
        """Those that do not last yet."""

    def apply(self, step: Step) -> None:
        """One call more."""
        match step.call:
            case "open" | "write":
                self._unsynced.add(step.path)
                if step.call == "open":
                    self._new.add(step.path)
            case "fsync":
                self._unsynced.discard(step.path)
                lasting = {name for name in self._new if name.parent == step.path}
                self._names |= lasting
                self._new -= lasting
            case "mkdir":
                self._new.add(step.path)
            case "link" | "replace":
                assert step.source is not None
                self._written_as[step.path] = step.source
                self._names.discard(step.path)
                self._new.add(step.path)

    def lasts(self, path: Path) -> bool:
        """Whether a file would be there, whole, in folders that would be there."""
        above = [folder for folder in path.parents if folder.is_relative_to(self._root)]
        return self._written_as.get(path, path) not in self._unsynced and {path, *above} <= self._names

    def is_whole(self, source: Path) -> bool:
        """Whether the bytes of a file would be there, under whatever name."""
        return source not in self._unsynced
