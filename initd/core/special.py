"""Special ranges: refused unless listed, never learned from an answer.

Sources: IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890 and successors), RFC 1918, RFC 6598,
RFC 4193, RFC 4291, RFC 3879, RFC 3927, RFC 6052, RFC 8215; Azure's documentation. Documentation ranges (RFC 5737,
RFC 3849) are not in it: nobody answers there, and refusing them as unlisted is enough.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initd.core.ruleset import IPAddress, IPNetwork

SPECIAL4: tuple[IPv4Network, ...] = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # RFC 1918
        "100.64.0.0/10",  # CGNAT
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host, on every machine of its: metadata and credentials
        "169.254.0.0/16",  # link-local, cloud metadata
        "172.16.0.0/12",  # RFC 1918
        "192.0.0.0/24",  # IETF protocol assignments
        "192.168.0.0/16",  # RFC 1918
        "198.18.0.0/15",  # benchmarking
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
SPECIAL6: tuple[IPv6Network, ...] = tuple(
    IPv6Network(text)
    for text in (
        "::/96",  # unspecified, loopback, v4-compatible
        "::ffff:0:0/96",  # v4-mapped
        "64:ff9b::/96",  # NAT64 (RFC 6052)
        "64:ff9b:1::/48",  # local-use NAT64 (RFC 8215)
        "2002::/16",  # 6to4: carries an IPv4 address
        "fc00::/7",  # ULA, with fd00:ec2::254
        "fe80::/10",  # link-local
        "fec0::/10",  # site-local (RFC 3879)
        "ff00::/8",  # multicast
    )
)


def special_of(address: IPAddress) -> IPNetwork | None:
    """The special range that holds `address`, or None for an ordinary public one."""
    ranges: tuple[IPNetwork, ...] = SPECIAL4 if address.version == 4 else SPECIAL6
    return next((network for network in ranges if address in network), None)
