"""Which names and addresses are those of this machine."""

import ipaddress
import socket
from typing import Final

_LOCAL: Final = "localhost"


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can be reached by it, nor reach what listens there.

    Args:
        host: name or address, without brackets and port; any way of writing it, also ``127.1`` and ``LOCALHOST.``.
    """
    name = host.lower().removesuffix(".")
    # RFC 6761: no name below it is ever another machine's.
    if name == _LOCAL or name.endswith(f".{_LOCAL}"):
        return True
    found = address_of(name)
    return found is not None and found.is_loopback


def leads_here(host: str) -> bool:
    """Whether a client that goes there reaches this machine: also by the address that means all of its addresses."""
    found = address_of(host.removesuffix("."))
    return is_loopback(host) or (found is not None and found.is_unspecified)


def is_link_local(host: str) -> bool:
    """Whether it is an address that means another machine on each network, as of services that hand out credentials."""
    found = address_of(host.removesuffix("."))
    return found is not None and found.is_link_local


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a system goes to for a text, IPv4 also where it is written as IPv6; None if it is a name."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return _of_numbers(host)
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found


def _of_numbers(host: str) -> ipaddress.IPv4Address | None:
    """IPv4 in the ways that systems take beside the usual one: ``127.1``, ``2130706433``, ``0x7f.0.0.1``."""
    if not host or not host.isascii() or any(letter.isspace() for letter in host):
        return None  # the system takes what follows a space for a comment
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None
