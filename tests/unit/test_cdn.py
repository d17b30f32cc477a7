"""Known shared ranges, and what is none."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from initd.core.cdn import RANGES, cdn_of


@pytest.mark.parametrize(
    ("address", "owner"),
    [
        ("104.16.1.1", "Cloudflare"),
        ("2606:4700::1", "Cloudflare"),
        ("151.101.1.1", "Fastly"),
        ("13.224.0.1", "CloudFront"),
        ("203.0.113.1", None),
        ("2001:db8::1", None),
    ],
)
def test_who_it_is(address, owner):
    assert cdn_of(ip_address(address)) == owner


def test_no_range_is_inside_another():
    for owner, network in RANGES:
        for other, wider in RANGES:
            if (owner, network) != (other, wider) and network.version == wider.version:
                assert not network.overlaps(wider)
