"""Names by which clients may call a server without tokens.

A page on the web can have its own name resolve to 127.0.0.1, and would then read the stores with the browser of
whoever visits it (DNS rebinding). Such requests have that name in ``Host``.
"""

import re
from collections.abc import Sequence
from typing import Final

from actstore.errors import JobError
from actstore.query.loopback import is_loopback, parse_host
from actstore.query.problem import Problem

_HOST: Final = re.compile(r"(?:\[(?P<bracketed>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:/@?#\s]+))(?::[0-9]{1,5})?")
_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


class Hosts:
    """The allowed names in the header ``Host``."""

    def __init__(self, allowed: Sequence[str]) -> None:
        """
        Args:
            allowed: names or addresses, beside those of loopback; a port is ignored.

        Raises:
            JobError: one of them is neither a name nor an address.
        """
        self._allowed = {_allowed(name) for name in allowed}

    def check(self, host: str) -> None:
        """Check that a request was meant for this server.

        Args:
            host: value of the header, with or without a port; "" where there is none, as in HTTP/1.0.

        Raises:
            Problem: the request was meant for another server.
        """
        if not host:
            return
        name = _name_of(host)
        if name is None or not (name in self._allowed or is_loopback(name)):
            raise Problem(
                421,
                "host",
                f"this server is not called {host[:100]!r}; use 127.0.0.1 or localhost, or start it with "
                "--allowed-host",
            )


def _name_of(host: str) -> str | None:
    """The name in its canonical form: small letters, no port, no dot at the end, one spelling of an address."""
    match = _HOST.fullmatch(host)
    if match is None:
        return None
    name = (match["bracketed"] or match["name"]).lower().removesuffix(".")
    address = parse_host(name)
    return name if address is None else str(address)


def _allowed(text: str) -> str:
    """
    Raises:
        JobError: no request can have this name.
    """
    bare = text.strip()
    address = parse_host(bare)
    if address is not None:
        return str(address)  # for IPv6 also without brackets
    try:
        ascii_text = bare if bare.isascii() else bare.encode("idna").decode()
    except UnicodeError:
        ascii_text = bare
    name = _name_of(ascii_text)
    if name is None or (parse_host(name) is None and not _NAME.fullmatch(name)):
        raise JobError(
            f"--allowed-host has {text[:100]!r}, which is no name of a machine; give one as box.example.org or "
            "10.0.0.7, without http:// or *, and the option once for each"
        )
    return name
