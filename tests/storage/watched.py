"""Storage whose calls are seen, and can be interrupted."""

from collections.abc import Callable
from typing import Any

from actstore.storage.blobs import Blobs

READS = {"read", "read_into"}
LISTINGS = {"names", "sizes"}
CHANGES = {"create", "replace", "delete"}
_CALLS = READS | LISTINGS | CHANGES | {"head"}


class CrashError(BaseException):
    """What a test raises in place of a process that ends; nothing catches it."""


class WatchedBlobs:
    """Any storage, with a note of each call. It is passed where `Blobs` are wanted, and says that it has no files, as
    these would be opened without a call.
    """

    is_local = False

    def __init__(
        self,
        blobs: Blobs,
        *,
        before: Callable[[str, str], None] | None = None,
        after: Callable[[str, str], None] | None = None,
    ) -> None:
        """
        Args:
            blobs: what does the work.
            before: called with the name of each call and its key.
            after: the same once it has taken effect.
        """
        self.calls: list[tuple[str, str]] = []
        self._blobs = blobs
        self._before, self._after = before, after

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._blobs, name)
        if name not in _CALLS:
            return found

        def call(key: str, *args: Any, **keywords: Any) -> Any:
            self.calls.append((name, key))
            if self._before is not None:
                self._before(name, key)
            result = found(key, *args, **keywords)
            if self._after is not None:
                self._after(name, key)
            return result

        return call

    def of(self, kinds: set[str]) -> list[str]:
        """Keys of the calls of some kinds, in order."""
        return [key for name, key in self.calls if name in kinds]


def watched(blobs: Blobs, **callbacks: Callable[[str, str], None]) -> Any:
    """Wrap blobs in `WatchedBlobs`; the type checker accepts the result as any storage."""
    return WatchedBlobs(blobs, **callbacks)
