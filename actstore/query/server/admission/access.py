"""Bearer tokens and the stores that they open, from a file that is read again and again."""

import fnmatch
import hashlib
import hmac
import logging
import os
import re
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from actstore.errors import JobError
from actstore.query.problem import LATER, Problem

_HASHED: Final = "sha256:"
_LOOK_S: Final = 0.5
"""Seconds between the beginnings of two looks at the file."""
_GOOD_S: Final = 2.0
"""Seconds from the beginning of a look for which its result is used. A token that was taken out of the file works for
this long at most, in every process, also if the file cannot be read any more.
"""
_MIN_LENGTH: Final = 16
_MAX_NBYTES: Final = 1 << 20
"""Bytes of the file at most. All of it is read each time: a change is noticed whatever inode, time and size say."""
_NAMED: Final = "name="
"""Prefix of the name of a token. No store name has an equals sign, so it is never part of a glob."""
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._@-]{0,63}")
_RESERVED_NAME: Final = "unix"
"""Name of the clients of a Unix socket. Addresses do not begin with a letter, or have colons."""
_LOG: Final = logging.getLogger(__name__)

Scopes = tuple[tuple[bytes, "Scope"], ...]


@dataclass(frozen=True)
class Scope:
    """The stores that a token opens."""

    client: str
    """Name of the token in its file, which several tokens may share; without a name, a short hash that does not reveal
    the token. Limits for a client apply to all tokens with this name.
    """
    globs: tuple[str, ...] = ("*",)

    @property
    def is_all(self) -> bool:
        return "*" in self.globs

    def allows(self, store: str) -> bool:
        return any(fnmatch.fnmatchcase(store, glob) for glob in self.globs)


def check_token_file(path: Path) -> None:
    """Check that a server can start with a token file, all of which must be right.

    Raises:
        JobError: the file cannot be read, has no token, or has a wrong line.
    """
    contents = _parse(_read(path), path)
    if contents.problem is not None:
        raise JobError(contents.problem)


class Access:
    """The tokens of a file. Each line has a token, then optionally ``name=`` and the name of its owner, and globs of
    the names of stores, or nothing for all stores; ``#`` begins a comment.

    A token can be given as ``sha256:`` and its hexadecimal digest. Earlier contents of the file let nobody in: a
    line without a token is skipped, and a file without any token, or that cannot be read, lets nobody in.

    The file is read by a thread of its own: a disk that hangs keeps no request waiting, but the last contents are
    valid for two seconds only, and then nobody is let in.
    """

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: path of the file, which is read here, and after `start` again and again.
        """
        self._path = path
        self._digest = b""
        """Digest of the file as it was read last."""
        self._is_settled = True
        self._contents = _Contents((), None)
        self._looked_at = 0.0
        self._is_late = False
        self._is_closed = threading.Event()
        self.look(is_first=True)

    def start(self) -> None:
        """Look at the file twice a second, until `close`."""
        threading.Thread(target=self._look_on, name="token-file", daemon=True).start()

    def close(self) -> None:
        """Stop looking."""
        self._is_closed.set()

    @property
    def is_open(self) -> bool:
        """Whether any token is valid."""
        return self._is_fresh() and bool(self._contents.scopes)

    def scope(self, token: str) -> Scope | None:
        """The stores that a token opens; None if it is not valid. It takes equally long for any token of a length, and
        waits for nothing.

        Raises:
            Problem: the contents of the file cannot be known now.
        """
        if not self._is_fresh():
            raise Problem(
                503,
                "busy",
                "the token file cannot be read now, so nobody is let in; ask again, and see the log of the server",
                LATER,
            )
        digest = hashlib.sha256(token.encode()).digest()
        matching = None
        for known, scope in self._contents.scopes:
            if hmac.compare_digest(known, digest):
                matching = scope
        return matching

    def _is_fresh(self) -> bool:
        is_late = time.monotonic() - self._looked_at > _GOOD_S
        if is_late and not self._is_late:
            self._is_late = True
            _LOG.error(
                "the token file %s could not be read within %g s; nobody is let in until it can",
                self._path,
                _GOOD_S,
            )
        return not is_late

    def _look_on(self) -> None:
        begun = time.monotonic()
        while not self._is_closed.wait(max(0.0, begun + _LOOK_S - time.monotonic())):
            begun = time.monotonic()
            try:
                self.look()
            except Exception:  # noqa: BLE001 - the thread must not end
                _LOG.exception("the token file %s cannot be looked at", self._path)

    def look(self, *, is_first: bool = False) -> None:
        """Read the file as it is now.

        Args:
            is_first: whether a last line without a line break counts at once.
        """
        # A change while this runs is seen by the next look.
        begun = time.monotonic()
        self._read_file(is_first=is_first)
        self._looked_at = begun
        if self._is_late and time.monotonic() - begun <= _GOOD_S:
            self._is_late = False
            _LOG.warning("the token file %s can be read again", self._path)

    def _read_file(self, *, is_first: bool) -> None:
        try:
            data = _read(self._path)
        except JobError as error:
            self._digest = b""
            self._use(_Contents((), str(error)))
            return
        digest = hashlib.sha256(data).digest()
        is_same = digest == self._digest
        if is_same and self._is_settled:
            return
        # A writer may write a line in two parts; the first part alone could name no stores, which means all.
        self._is_settled = is_same or is_first or data.endswith(b"\n")
        self._digest = digest
        self._use(_parse(data if self._is_settled else data[: data.rfind(b"\n") + 1], self._path))

    def _use(self, contents: "_Contents") -> None:
        """Use these contents, and log a new problem once."""
        before, self._contents = self._contents, contents
        if contents.problem == before.problem:
            return
        if contents.problem is None:
            _LOG.warning("the token file %s is as it should be again", self._path)
        elif contents.scopes:
            _LOG.error("%s; that line is passed over", contents.problem)
        else:
            _LOG.error("%s; nobody is let in until it is right", contents.problem)


@dataclass(frozen=True)
class _Contents:
    """Contents of a token file."""

    scopes: Scopes
    problem: str | None
    """What is wrong in the first bad line, or with the whole file; None if all is right."""


def _read(path: Path) -> bytes:
    """Read all of the file.

    Raises:
        JobError: the file cannot be read.
    """
    try:
        # O_NONBLOCK: opening a pipe would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise JobError(f"the token file {path} is no file; give a text file with one token a line")
            data = file.read(_MAX_NBYTES + 1)
    except OSError as error:
        raise JobError(
            f"the token file {path} cannot be read: {error.strerror}; give a text file with one token a line"
        ) from error
    if len(data) > _MAX_NBYTES:
        raise JobError(
            f"the token file {path} has more than {_MAX_NBYTES} bytes; give fewer tokens, or globs of stores"
        )
    return data


def _parse(data: bytes, path: Path) -> _Contents:
    scopes, problem = [], None
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            words = line.decode().partition("#")[0].split()
        except UnicodeDecodeError:
            problem = problem or f"line {number} of the token file {path} is not UTF-8; write it as text"
            continue
        if not words:
            continue
        try:
            scopes.append(_parse_line(words))
        except ValueError as error:
            problem = problem or f"line {number} of the token file {path} {error}"
    if not scopes and problem is None:
        problem = f"the token file {path} has no token; write one a line"
    return _Contents(tuple(scopes), problem)


def _parse_line(words: list[str]) -> tuple[bytes, Scope]:
    """
    Raises:
        ValueError: the line has no token, or not exactly one good name where it has ``name=``.
    """
    digest = _digest(words[0])
    if digest is None:
        raise ValueError(
            f"has no token of {_MIN_LENGTH} characters or more, all ASCII; "
            'make one with python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    names = [word.removeprefix(_NAMED) for word in words[1:] if word.startswith(_NAMED)]
    if len(names) > 1:
        raise ValueError(f"has {len(names)} names; give its token one {_NAMED}")
    if names and (not _NAME.fullmatch(names[0]) or names[0] == _RESERVED_NAME):
        raise ValueError(
            f"has the name {names[0][:100]!r}; a name begins with a letter, has up to 64 letters, digits, '.', '_', "
            f"'@' and '-', and is not {_RESERVED_NAME!r}"
        )
    globs = tuple(word for word in words[1:] if not word.startswith(_NAMED))
    return digest, Scope(names[0] if names else digest.hex()[:12], globs or ("*",))


def _digest(word: str) -> bytes | None:
    if word.startswith(_HASHED):
        try:
            digest = bytes.fromhex(word.removeprefix(_HASHED))
        except ValueError:
            return None
        return digest if len(digest) == hashlib.sha256().digest_size else None
    return hashlib.sha256(word.encode()).digest() if len(word) >= _MIN_LENGTH and word.isascii() else None
