"""Address ranges behind which many unrelated sites are served: whoever lists one of them opens its neighbours too.

As Cloudflare and Fastly published them in 2026, and of Amazon CloudFront the larger blocks. A hint for `fwctl doctor`:
nothing is allowed or refused by it, and a range that is missing here only goes unmentioned.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initd.core.ruleset import IPAddress

_PUBLISHED = {
    "Cloudflare": (
        "103.21.244.0/22 103.22.200.0/22 103.31.4.0/22 104.16.0.0/13 104.24.0.0/14 108.162.192.0/18 131.0.72.0/22 "
        "141.101.64.0/18 162.158.0.0/15 172.64.0.0/13 173.245.48.0/20 188.114.96.0/20 190.93.240.0/20 197.234.240.0/22 "
        "198.41.128.0/17 2400:cb00::/32 2405:8100::/32 2405:b500::/32 2606:4700::/32 2803:f800::/32 2a06:98c0::/29 "
        "2c0f:f248::/32"
    ),
    "Fastly": (
        "23.235.32.0/20 43.249.72.0/22 103.244.50.0/24 103.245.222.0/23 103.245.224.0/24 104.156.80.0/20 "
        "140.248.64.0/18 140.248.128.0/17 146.75.0.0/17 151.101.0.0/16 157.52.64.0/18 167.82.0.0/17 167.82.128.0/20 "
        "167.82.160.0/20 167.82.224.0/20 172.111.64.0/18 185.31.16.0/22 199.27.72.0/21 199.232.0.0/16 2a04:4e40::/32 "
        "2a04:4e42::/32"
    ),
    "CloudFront": (
        "13.32.0.0/15 13.35.0.0/16 13.224.0.0/14 13.249.0.0/16 18.64.0.0/14 18.154.0.0/15 18.160.0.0/15 18.164.0.0/15 "
        "18.172.0.0/15 18.238.0.0/15 18.244.0.0/15 52.84.0.0/15 54.182.0.0/16 54.192.0.0/16 54.230.0.0/17 99.84.0.0/16 "
        "99.86.0.0/16 108.138.0.0/15 108.156.0.0/14 143.204.0.0/16 205.251.192.0/19 2600:9000::/28"
    ),
}

RANGES: tuple[tuple[str, IPv4Network | IPv6Network], ...] = tuple(
    (owner, ip_network(text)) for owner, texts in _PUBLISHED.items() for text in texts.split()
)


def cdn_of(address: IPAddress) -> str | None:
    """Whose shared range holds `address`."""
    return next((owner for owner, network in RANGES if address in network), None)
