"""Addresses of clients, and of the proxies that forward their requests."""

import ipaddress
from collections.abc import Iterable
from typing import Final

from actstore.errors import JobError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

UNIX: Final = "unix"
"""Stands for the address of all clients of a Unix socket."""
_ANY: Final = "*"
_SITE: Final = 64
"""Bits of an IPv6 address that name the network of a customer; a client can change the others."""
_MAX_HOPS: Final = 64
"""Entries of ``X-Forwarded-For`` that are read at most, from the end."""


def parse_address(text: str) -> Address | None:
    """The address that a text spells, an IPv4 address also where it is written as IPv6 (``::ffff:10.0.0.1``); None if
    it is no address.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def address_text(text: str) -> str:
    """An address in the spelling for logs; other text stays as it is."""
    address = parse_address(text)
    return text if address is None else str(address)


def counted_as(text: str) -> str:
    """The address by which the limits of a client count: for IPv6 the network of 64 bits, which every customer has."""
    address = parse_address(text)
    if address is None:
        return text
    # Neighbours share the network of link-local addresses, and a machine has one loopback address.
    if address.version == 4 or address.is_link_local or address.is_loopback:
        return str(address)
    return str(ipaddress.ip_network((int(address), _SITE), strict=False))


class Proxies:
    """Proxies whose ``X-Forwarded-For`` and ``X-Forwarded-Proto`` are trusted."""

    def __init__(self, text: str | None) -> None:
        """
        Args:
            text: addresses and networks, joined by commas; ``*`` trusts everybody; None trusts nobody.

        Raises:
            JobError: one of them is no address or network.
        """
        entries = [] if text is None else [entry.strip() for entry in text.split(",")]
        self._is_any = entries == [_ANY]
        self._networks = [] if self._is_any else [_network(entry) for entry in entries]

    def trusts(self, peer: str) -> bool:
        """Whether a peer may name the clients of its requests.

        Args:
            peer: address of the peer, or `UNIX`.
        """
        return self._is_any or self._has(parse_address(peer))

    def _has(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)

    def client(self, peer: str, forwarded: Iterable[str]) -> str:
        """The address of the client: the last one in ``X-Forwarded-For`` that is not of a proxy. The client can have
        written those before it itself.

        Args:
            peer: address of the connected proxy.
            forwarded: values of all headers ``X-Forwarded-For``.
        """
        hops = ",".join(forwarded).split(",")[-_MAX_HOPS:]
        client = peer
        for hop in reversed(hops):
            address = _address_of_hop(hop.strip())
            if address is None:
                break  # the proxy behind it did not know the address
            client = str(address)
            if not self._has(address):
                break
        return client


def _address_of_hop(text: str) -> Address | None:
    """The address in a hop, which some proxies write with the port."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    return parse_address(text)


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        what = (
            "is no address or network" if not _is_network_with_host(text) else "has bits beyond its network"
        )
        raise JobError(
            f"--forwarded-allow-ips has {text[:100]!r}, which {what}; give addresses and networks such as "
            "10.0.0.1,10.1.0.0/16, or * alone for whoever connects"
        ) from error
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.ip_network((int(mapped), network.prefixlen - 96))
    return network


def _is_network_with_host(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True
