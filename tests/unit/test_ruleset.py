from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from initd.core.policy import Feed, FeedRule, Origin, RangeRule, Service
from initd.core.ruleset import Element, Surroundings, _inside_special, _key, _merged, _network, compile_ruleset
from initd.core.special import SPECIAL4, SPECIAL6

HTTPS, SSH = Service("tcp", 443), Service("tcp", 22)
ORIGIN = Origin(1, "x")
AROUND = Surroundings(990)


def networks(bits: int):
    kind = IPv4Network if bits == 32 else IPv6Network
    # Few distinct high bits, so that neighbours and containment really occur.
    number = st.integers(0, 255).map(lambda n: n << (bits - 8)) | st.integers(0, 2**bits - 1)
    return st.builds(lambda n, p: kind((n >> (bits - p) << (bits - p), p)), number, st.integers(0, bits))


anywhere = networks(32) | networks(128)


def ruleset(*texts: str, services=frozenset({HTTPS})):
    rules = [RangeRule(ip_network(text), services, ORIGIN) for text in texts]
    return compile_ruleset(rules, [], networks={}, around=AROUND)


def shown(elements) -> set[str]:
    return {str(element.network) for element in elements}


@given(st.lists(anywhere, max_size=30))
def test_merging_is_what_ipaddress_does_but_without_a_whole_family(members):
    expected = set()
    for version in (4, 6):
        for network in collapse_addresses([one for one in members if one.version == version]):
            expected |= set(network.subnets()) if network.prefixlen == 0 else {network}
    assert {_network(key) for key in _merged({_key(one) for one in members})} == expected


@given(anywhere | st.sampled_from([*SPECIAL4, *SPECIAL6]).flatmap(lambda net: st.sampled_from([net, net.supernet()])))
def test_bisection_agrees_with_the_definition(network):
    ranges = SPECIAL4 if network.version == 4 else SPECIAL6
    assert _inside_special(_key(network)) is any(network.subnet_of(special) for special in ranges)


def test_a_range_that_straddles_stays_static():
    made = ruleset("8.0.0.0/6", "10.1.0.0/16", "fc00::/6", "fd00:1::/32")
    assert shown(made.static) == {"8.0.0.0/6", "fc00::/6"}
    assert shown(made.private) == {"10.1.0.0/16", "fd00:1::/32"}


def test_special_and_public_neighbours_do_not_merge():
    made = ruleset("10.0.0.0/8", "11.0.0.0/8")
    assert shown(made.private) == {"10.0.0.0/8"}, "merged to 10.0.0.0/7 it would be refused"
    assert shown(made.static) == {"11.0.0.0/8"}


def test_services_are_kept_apart():
    rules = [
        RangeRule(ip_network("203.0.113.0/25"), frozenset({HTTPS, SSH}), ORIGIN),
        RangeRule(ip_network("203.0.113.128/25"), frozenset({HTTPS}), ORIGIN),
    ]
    made = compile_ruleset(rules, [], networks={}, around=AROUND)
    assert made.static == {
        Element(ip_network("203.0.113.0/24"), "tcp", 443),
        Element(ip_network("203.0.113.0/25"), "tcp", 22),
    }


def test_feeds():
    rules = [FeedRule(Feed.GITHUB, frozenset({SSH}), ORIGIN), FeedRule(Feed.SUBNET, frozenset({HTTPS}), ORIGIN)]
    given_networks = {Feed.GITHUB: (ip_network("192.0.2.0/24"),)}
    made = compile_ruleset([], rules, networks=given_networks, around=AROUND)
    assert made.static == {Element(ip_network("192.0.2.0/24"), "tcp", 22)}
    assert made.private == frozenset()
    made = compile_ruleset([], rules, networks={Feed.SUBNET: (ip_network("172.18.0.0/16"),)}, around=AROUND)
    assert made.private == {Element(ip_network("172.18.0.0/16"), "tcp", 443)}


def test_surroundings_are_passed_on():
    around = Surroundings(7, engine_dns=True, subnets=frozenset({ip_network("172.18.0.0/16")}), log=False)
    made = compile_ruleset([], [], networks={}, around=around)
    assert (made.warden_uid, made.engine_dns, made.subnets, made.log) == (7, True, around.subnets, False)


@pytest.mark.slow
def test_a_hundred_thousand_ranges():
    services = frozenset({HTTPS, SSH, Service("tcp", 80)})
    rules = [RangeRule(IPv4Network(((11 << 24) + index * 512, 24)), services, ORIGIN) for index in range(100_000)]
    made = compile_ruleset(rules, [], networks={}, around=AROUND)
    assert len(made.static) == 300_000
