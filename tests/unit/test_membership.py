from __future__ import annotations

from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from initd.core.membership import Membership
from initd.core.ruleset import Element

NETWORKS = st.builds(
    lambda number, length: ip_network((number >> (32 - length) << (32 - length), length)),
    st.integers(0, 2**32 - 1),
    st.integers(8, 32),
)


@given(st.lists(st.tuples(NETWORKS, st.sampled_from(["tcp", "udp"]), st.integers(1, 3)), max_size=20), st.data())
def test_membership_is_what_a_loop_over_all_elements_says(entries: list, data: st.DataObject) -> None:
    elements = [Element(*one) for one in entries]
    inside = [int(one.network.network_address) for one in elements]
    number = data.draw(st.sampled_from(inside) if inside else st.integers(0, 2**32 - 1))
    address = ip_address(max(0, min(2**32 - 1, number + data.draw(st.integers(-2, 2)))))
    proto, port = data.draw(st.sampled_from(["tcp", "udp"])), data.draw(st.integers(1, 3))
    expected = any((one.proto, one.port) == (proto, port) and address in one.network for one in elements)
    assert Membership(elements).holds(address, proto, port) is expected


def test_membership_tells_families_apart() -> None:
    held = Membership([Element(ip_network("::/0"), "tcp", 443)])
    assert held.holds(ip_address("2001:db8::1"), "tcp", 443)
    assert not held.holds(ip_address("203.0.113.1"), "tcp", 443)
