"""Who may read which stores: bearer tokens from a file that is read again when it changes."""

import fnmatch
import hashlib
import hmac
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from actstore.errors import JobError

_HASHED: Final = "sha256:"
_LOOK_S: Final = 1.0
"""Between two looks at the file."""
_MIN_LENGTH: Final = 16
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scope:
    """The stores that a token is good for."""

    client: str
    """Tells this token from others, and says nothing of it."""
    globs: tuple[str, ...] = ("*",)

    @property
    def is_all(self) -> bool:
        return "*" in self.globs

    def allows(self, store: str) -> bool:
        return any(fnmatch.fnmatchcase(store, glob) for glob in self.globs)


class Access:
    """The tokens of a file: one a line, then globs of the names of stores, or nothing for all; ``#`` begins a comment.

    A token can be given as ``sha256:`` and the hexadecimal digest of it.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            JobError: the file cannot be read, or has no token, or a short one.
        """
        self._path = path
        self._lock = threading.Lock()
        self._looked_at = time.monotonic()
        self._version = self._seen()
        self._scopes = _parsed(path)

    def scope(self, token: str) -> Scope | None:
        """What a token is good for; None if nothing. It takes equally long for any token of a length."""
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for known, scope in self._current():
            if hmac.compare_digest(known, digest):
                found = scope
        return found

    def _current(self) -> tuple[tuple[bytes, Scope], ...]:
        with self._lock:
            if time.monotonic() - self._looked_at > _LOOK_S:
                self._looked_at = time.monotonic()
                version = self._seen()
                if version != self._version:
                    self._version = version
                    try:
                        self._scopes = _parsed(self._path)
                    except JobError as error:
                        # Half-written, or gone for a moment: those who had access keep it until it is right again.
                        _LOG.error("%s; the tokens stay as they were", error)
            return self._scopes

    def _seen(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


def _parsed(path: Path) -> tuple[tuple[bytes, Scope], ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise JobError(
            f"the token file {path} cannot be read: {reason}; give a text file with one token a line"
        ) from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        digest = _digest(words[0])
        if digest is None:
            raise JobError(
                f"line {number} of the token file {path} has no token of {_MIN_LENGTH} characters or more, all ASCII; "
                'make one with python -c "import secrets; print(secrets.token_urlsafe())"'
            )
        found.append((digest, Scope(digest.hex()[:12], tuple(words[1:]) or ("*",))))
    if not found:
        raise JobError(f"the token file {path} has no token; write one a line")
    return tuple(found)


def _digest(word: str) -> bytes | None:
    if word.startswith(_HASHED):
        try:
            digest = bytes.fromhex(word.removeprefix(_HASHED))
        except ValueError:
            return None
        return digest if len(digest) == hashlib.sha256().digest_size else None
    return hashlib.sha256(word.encode()).digest() if len(word) >= _MIN_LENGTH and word.isascii() else None
