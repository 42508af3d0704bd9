"""In which networks an address must lie: what keeps a name that leads elsewhere from taking private requests along.

Owns the networks that are private by their standard. Refuses names: whoever looks one up asks for each address. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address, ip_network

# RFC 1918, 6598 (shared by carriers, clusters and overlays), 3927 and 4291 (of the link), 4193, and loopback.
PRIVATE = (
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "169.254.0.0/16",
    "127.0.0.0/8",
    "fc00::/7",
    "fe80::/10",
    "::1/128",
)


class Networks:
    """Some networks; none of them named means every address."""

    def __init__(self, stated: Iterable[str]) -> None:
        """`stated` in CIDR notation. Raises ValueError where one is not."""
        self._networks = tuple(ip_network(network) for network in stated)

    def hold(self, address: str) -> bool:
        """Whether the IP address lies in one of them; an IPv4 address in the clothes of an IPv6 one is the former."""
        found = ip_address(address.partition("%")[0])
        if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        return not self._networks or any(found in network for network in self._networks)


def literal(host: str) -> str | None:
    """The host where it is an IP address itself, or None."""
    try:
        return str(ip_address(host))
    except ValueError:
        return None
