"""Leases against a model of the kernel's set: what a lease needs is there, what none needs goes."""

from __future__ import annotations

import time
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from initd.core.leases import MAX_SAVED, WILD_MOST, Held, Leases, Terms, from_state
from initd.core.policy import Service
from initd.core.ruleset import LEARNED_MOST, Element

WEB, SSH = Service("tcp", 443), Service("tcp", 22)
A, B, C = (ip_address(f"203.0.113.{n}") for n in (1, 2, 3))
SIX = ip_address("2001:db8::1")


def element(address, service=WEB):
    return Element(ip_network(address), service.proto, service.port)


def held(name, *addresses, services=frozenset({WEB}), literal=False):
    return Held(name, addresses, services, literal)


def take(leases, name, *addresses, ttl=0.0, now=0.0, **how):
    grant = leases.grant(held(name, *addresses, **how), lifetime=leases.terms.lifetime(ttl), now=now)
    return grant, leases.commit(grant)


@pytest.mark.parametrize(("ttl", "expected"), [(0, 90), (1, 90), (60, 90), (61, 91), (300, 330)])
def test_lifetime_is_the_longer_of_ttl_and_floor_plus_grace(ttl, expected):
    grant, _ = take(Leases(), "a", A, SIX, ttl=ttl)
    assert dict(grant.insert) == {element(A): expected, element(SIX): expected}


def test_a_grant_changes_nothing_until_it_is_committed():
    leases = Leases()
    leases.grant(held("a", A), lifetime=90, now=0)
    assert len(leases) == 0


def test_every_service_is_an_element():
    grant, _ = take(Leases(), "a", A, services=frozenset({WEB, SSH}))
    assert {one for one, _ in grant.insert} == {element(A, WEB), element(A, SSH)}


def test_a_shorter_answer_never_shortens_what_another_name_needs():
    leases = Leases()
    take(leases, "long", A, ttl=300)
    grant, _ = take(leases, "short", A, ttl=5, now=10)
    assert dict(grant.insert) == {element(A): 320}
    assert [one.name for one in leases.of(A)] == ["long", "short"]


def test_an_address_is_forgotten_when_its_last_name_lets_go():
    leases = Leases()
    take(leases, "a", A, ttl=60)
    take(leases, "b", A, ttl=120)
    assert leases.sweep(91, frozenset()) == ([], [])
    assert [one.name for one in leases.of(A)] == ["b"]
    assert leases.sweep(151, frozenset()) == ([], [element(A)])
    assert len(leases) == 0


def test_an_address_in_use_outlives_its_lease_and_no_longer():
    leases = Leases()
    take(leases, "a", A, B, ttl=60)
    assert leases.sweep(70, frozenset({A})) == ([], [])
    assert leases.sweep(80, frozenset({A})) == ([(element(A), 90)], [])
    assert leases.sweep(95, frozenset({A})) == ([], [element(B)])
    assert leases.sweep(171, frozenset()) == ([], [element(A)])


def test_short_terms_do_not_let_an_address_in_use_lapse_between_sweeps():
    leases = Leases(Terms(floor=1, grace=0))
    take(leases, "a", A)
    kept = 1.0
    for now in range(1, 100, 10):
        assert kept >= now
        extend, _ = leases.sweep(now, frozenset({A}))
        kept = max([kept, *(now + seconds for _, seconds in extend)])


def test_over_the_cap_the_ones_answered_longest_ago_go_first_but_none_in_use():
    leases = Leases(Terms(cap=2))
    take(leases, "a", A)
    take(leases, "a", B, now=1)
    take(leases, "a", A, now=2)
    assert take(leases, "a", C, now=3)[1] == [element(B)]
    leases.sweep(4, frozenset({A}))
    assert take(leases, "a", B, now=5)[1] == [element(C)]
    assert leases.addresses_of("a") == (A, B)


def test_an_evicted_address_stays_when_another_name_holds_it():
    leases = Leases(Terms(cap=1))
    take(leases, "b", A)
    take(leases, "a", A)
    assert take(leases, "a", B)[1] == []


def test_many_names_of_one_address_cost_no_more_than_many_addresses():
    """A wildcard whose owner answers every name with the same address: it was minutes."""
    leases, begin = Leases(), time.process_time()
    web, ssh = frozenset({WEB}), frozenset({SSH})
    for number in range(20_000):
        take(leases, f"n{number}", A, services=(web, ssh)[number % 2])
    leases.reconsider(lambda name, _: ssh if name != "n0" else frozenset(), now=0)
    assert leases.sweep(91, frozenset())[1] == [element(A, SSH)]
    assert time.process_time() - begin < 5.0
    assert (len(leases), leases.needs(element(A, SSH))) == (0, False)


def test_names_below_wildcards_hold_no_more_than_their_share(monkeypatch):
    monkeypatch.setattr("initd.core.leases.WILD_MOST", 4)
    leases = Leases()
    assert leases.has_room(held("a", A, B))
    take(leases, "listed", A, B, C, literal=True)
    assert leases.has_room(held("a", A, B)), "a literal name takes none of it"
    take(leases, "a", A, B)
    assert leases.has_room(held("a", B, A))
    assert not leases.has_room(held("a", A, C))
    assert not leases.has_room(held("b", A))
    assert leases.has_room(held("b", A, B, C, literal=True))
    leases.sweep(91, frozenset())
    assert leases.has_room(held("b", A, services=frozenset({WEB, SSH})))
    assert not leases.has_room(held("b", A, B, services=frozenset({WEB, SSH}))), "two elements each"


def test_the_share_is_counted_through_every_change(monkeypatch):
    monkeypatch.setattr("initd.core.leases.WILD_MOST", 6)
    leases = Leases(Terms(cap=1))
    take(leases, "a", A, services=frozenset({WEB, SSH}))
    take(leases, "a", B, services=frozenset({WEB, SSH}))  # A is over the cap
    assert leases.has_room(held("b", A, services=frozenset({WEB, SSH})))
    leases.reconsider(lambda *_: frozenset({WEB}), now=1)
    assert leases.has_room(held("b", A, C))
    assert not leases.has_room(held("b", A, C, SIX))


def test_what_wildcards_may_hold_leaves_most_of_the_kernels_set_to_others():
    assert 4 * WILD_MOST <= LEARNED_MOST


def test_one_answer_beyond_the_cap_is_cut():
    grant, evicted = take(Leases(Terms(cap=2)), "a", A, B, C)
    assert grant.held.addresses == (A, B)
    assert evicted == []


def test_a_new_policy_takes_and_gives():
    leases = Leases()
    take(leases, "gone", A, ttl=60)
    take(leases, "less", B, ttl=60, services=frozenset({WEB, SSH}))
    take(leases, "more", C, ttl=60)
    after = {"gone": frozenset(), "less": frozenset({WEB}), "more": frozenset({WEB, SSH})}
    lost, gained = leases.reconsider(lambda name, _: after[name], now=10)
    assert set(lost) == {element(A), element(B, SSH)}
    assert gained == [(element(C, SSH), 80)]
    assert set(leases.names()) == {"less", "more"}


def test_a_new_policy_leaves_what_another_name_still_opens():
    leases = Leases()
    take(leases, "gone", A)
    take(leases, "kept", A)
    lost, gained = leases.reconsider(lambda name, _: frozenset({WEB} if name == "kept" else ()), now=0)
    assert (lost, gained) == ([], [])


def test_state_comes_back():
    leases = Leases()
    take(leases, "a.example", A, SIX, ttl=100)
    assert from_state(leases.to_state(30.5)) == {"a.example": {A: 100, SIX: 100}}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "x",
        {"a": None},
        {"a": {"203.0.113.1": "soon"}},
        {"a": {"203.0.113.1": True}},
        {"a": {"x": 5}},
        {1: {}},
    ],
)
def test_a_saved_state_of_another_form_yields_nothing(data):
    assert from_state(data) == {}


def test_a_saved_state_is_bounded():
    data = {"a": {str(ip_address(n)): 5 for n in range(MAX_SAVED + 10)}}
    assert len(from_state(data)["a"]) == MAX_SAVED


NAMES, ADDRESSES = st.sampled_from(["a", "b", "c"]), st.sampled_from([A, B, C, SIX])
SERVICES = st.frozensets(st.sampled_from([WEB, SSH]))
STEPS = st.one_of(
    st.tuples(st.just("answer"), NAMES, st.lists(ADDRESSES, min_size=1), st.integers(0, 200)),
    st.tuples(st.just("sweep"), st.frozensets(ADDRESSES)),
    st.tuples(st.just("policy"), st.dictionaries(NAMES, SERVICES)),
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(dict.fromkeys("abc", SERVICES)), st.lists(st.tuples(st.integers(0, 40), STEPS), max_size=30)
)
def test_the_kernel_holds_what_some_lease_needs_and_nothing_else(table, steps):  # noqa: C901 - one model, one loop
    leases, kernel, now = Leases(Terms(cap=3)), {}, 0.0
    for wait, step in steps:
        now += wait
        kernel = {one: until for one, until in kernel.items() if until > now}  # the set's own time-outs
        match step:
            case ("answer", name, addresses, ttl) if table[name]:
                wanted = held(name, *addresses, services=table[name])
                grant = leases.grant(wanted, lifetime=leases.terms.lifetime(ttl), now=now)
                for one, seconds in grant.insert:
                    assert seconds >= 1
                    kernel[one] = now + seconds
                for one in leases.commit(grant):
                    kernel.pop(one, None)
            case ("sweep", in_use):
                extend, forget = leases.sweep(now, in_use)
                assert all(seconds >= 1 for _, seconds in extend)
                kernel.update((one, now + seconds) for one, seconds in extend)
                for one in forget:
                    kernel.pop(one, None)
            case ("policy", changed):
                table = table | changed
                lost, gained = leases.reconsider(lambda name, _, t=table: t[name], now=now)
                assert all(seconds >= 1 for _, seconds in gained), "0 means for ever"
                for one in lost:
                    kernel.pop(one, None)
                kernel.update((one, now + seconds) for one, seconds in gained)
        for lease in leases:
            for service in lease.services:
                until = kernel.get(element(lease.address, service))
                assert lease.expires <= now or (until is not None and until >= lease.expires)
        wanted = {element(lease.address, service) for lease in leases for service in lease.services}
        assert set(kernel) <= wanted
