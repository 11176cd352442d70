"""Tells names and addresses of this machine from those of others."""

import ipaddress
import socket
from typing import Final

_LOCAL: Final = "localhost"


def is_loopback(host: str) -> bool:
    """Whether a name or address reaches this machine only, so that nobody else reaches what listens there.

    Args:
        host: name or address, without brackets and port; any way of writing it, also ``127.1`` and ``LOCALHOST.``.
    """
    name = host.lower().removesuffix(".")
    # RFC 6761: no name below it is ever another machine's.
    if name == _LOCAL or name.endswith(f".{_LOCAL}"):
        return True
    address = parse_host(name)
    return address is not None and address.is_loopback


def leads_here(host: str) -> bool:
    """Whether a client that connects to a host reaches this machine, also by the address that means all of its
    addresses.
    """
    address = parse_host(host.removesuffix("."))
    return is_loopback(host) or (address is not None and address.is_unspecified)


def is_link_local(host: str) -> bool:
    """Whether a host is a link-local address, at which clouds have services that hand out credentials."""
    address = parse_host(host.removesuffix("."))
    return address is not None and address.is_link_local


def parse_host(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a system connects to for a text, IPv4 also where it is written as IPv6; None if it is a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return _of_numbers(host)
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def _of_numbers(host: str) -> ipaddress.IPv4Address | None:
    """An IPv4 address in the spellings that systems accept beside the usual one: ``127.1``, ``2130706433``,
    ``0x7f.0.0.1``.
    """
    if not host or not host.isascii() or any(letter.isspace() for letter in host):
        return None  # the system takes what follows a space for a comment
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None
