"""Addresses of clients, and of the proxies that speak for them."""

import ipaddress
from collections.abc import Iterable
from typing import Final

from actstore.errors import JobError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

UNIX: Final = "unix"
"""In the place of an address: all clients of a Unix socket."""
_ANY: Final = "*"
_SITE: Final = 64
"""Bits of an IPv6 address that say whose it is; the others a client changes as it likes."""
_MAX_HOPS: Final = 64
"""Entries of ``X-Forwarded-For`` that are looked at."""


def address_of(text: str) -> Address | None:
    """What a text says, an IPv4 address also where it is written as one of IPv6 (``::ffff:10.0.0.1``); None if it is
    no address.
    """
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found


def shown(text: str) -> str:
    """An address as logs have it; what is none, as it is."""
    found = address_of(text)
    return text if found is None else str(found)


def counted_as(text: str) -> str:
    """The address that limits of one client are for: of IPv6 the network of 64 bits, which every customer has."""
    found = address_of(text)
    if found is None:
        return text
    # Neighbours share the network of addresses of a link, and a machine has one address of loopback.
    if found.version == 4 or found.is_link_local or found.is_loopback:
        return str(found)
    return str(ipaddress.ip_network((int(found), _SITE), strict=False))


class Proxies:
    """Those whose ``X-Forwarded-For`` and ``X-Forwarded-Proto`` are believed."""

    def __init__(self, text: str | None) -> None:
        """
        Args:
            text: addresses and networks, joined by commas; ``*`` for whoever connects; None for nobody.

        Raises:
            JobError: one of them is no address or network.
        """
        entries = [] if text is None else [each.strip() for each in text.split(",")]
        self._is_any = entries == [_ANY]
        self._networks = [] if self._is_any else [_network(each) for each in entries]

    def trusts(self, peer: str) -> bool:
        """Whether whoever is connected may speak for others.

        Args:
            peer: its address, or `UNIX`.
        """
        return self._is_any or self._has(address_of(peer))

    def _has(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)

    def client(self, peer: str, forwarded: Iterable[str]) -> str:
        """The address of the client: the last one of ``X-Forwarded-For`` that is not a proxy's. What is before that,
        the client can have written itself.

        Args:
            peer: address of the proxy that is connected.
            forwarded: all headers of that name.
        """
        hops = ",".join(forwarded).split(",")[-_MAX_HOPS:]
        found = peer
        for hop in reversed(hops):
            address = _of_hop(hop.strip())
            if address is None:
                break  # the proxy behind it did not know better
            found = str(address)
            if not self._has(address):
                break
        return found


def _of_hop(text: str) -> Address | None:
    """An address, which some proxies write with the port."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    return address_of(text)


def _network(text: str) -> Network:
    try:
        found = ipaddress.ip_network(text)
    except ValueError as error:
        what = (
            "is no address or network" if not _is_network_with_host(text) else "has bits beyond its network"
        )
        raise JobError(
            f"--forwarded-allow-ips has {text[:100]!r}, which {what}; give addresses and networks such as "
            "10.0.0.1,10.1.0.0/16, or * alone for whoever connects"
        ) from error
    if isinstance(found, ipaddress.IPv6Network) and found.prefixlen >= 96:
        mapped = found.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.ip_network((int(mapped), found.prefixlen - 96))
    return found


def _is_network_with_host(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True
