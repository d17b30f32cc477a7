"""A reload under load, and what it takes away: every backend, real connections."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from ipaddress import ip_address

import pytest

from initd.core.ruleset import Ruleset
from initd.enforce import Enforcer
from initd.kernel import conntrack
from tests.kernel.test_contract import LEARNED4, LISTED4, LISTED6, RULESET, armed, element, tries
from tests.kernel.wire import WARDEN, attempt

pytestmark = pytest.mark.kernel

OTHER = Ruleset(WARDEN, static=frozenset({element(LISTED4), element("192.0.2.0/24"), element(LISTED6)}))


ENOUGH = 400  # connections


def client(pace: float = 0.005):
    """A process that opens a connection each `pace` seconds to addresses that stay listed, `ENOUGH` at least.

    Two descriptors: closing the first ends it; then it writes (opened, failed) to the second.
    """
    over, ours = os.pipe()
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(ours)
        opened = failed = 0
        until = time.monotonic() + 60
        while (opened <= ENOUGH or not select.select([over], [], [], 0)[0]) and (now := time.monotonic()) < until:
            try:
                socket.create_connection(((LISTED4, LISTED6)[(opened + failed) % 2], 443), 5).close()
                opened += 1
            except OSError:
                failed += 1
            time.sleep(max(0.0, pace - (time.monotonic() - now)))
        os.write(write, f"{opened} {failed}".encode())
        os._exit(0)
    os.close(over)
    os.close(write)
    return ours, read


def reloads(backend, between):
    """50 reloads, forth and back, while the client is at it."""
    made = armed(backend)
    made.learn([(element(LEARNED4), 600)])
    enforcer = Enforcer(made)
    ours, read = client()
    time.sleep(0.1)
    for number in range(50):
        between(made)
        enforcer.enforce((OTHER, RULESET)[number % 2])
        time.sleep(0.03)
    os.close(ours)
    opened, failed = map(int, os.read(read, 64).split())
    return opened, failed, tries([("tcp", LEARNED4)])[0].outcome


@pytest.mark.slow
def test_fifty_reloads_lose_no_connection(backend, wire):
    opened, failed, learned = wire.do(reloads, backend, lambda made: None)
    assert failed == 0
    assert opened > ENOUGH
    assert learned == "open"


@pytest.mark.slow
def test_a_reload_that_closed_first_would_lose_some(backend, wire):
    """Negative control of the test above."""
    _, failed, _ = wire.do(reloads, backend, lambda made: made.lockdown(WARDEN))
    assert failed > 0


def hold(address: str) -> socket.socket:
    """A connection on which the far side keeps sending."""
    sock = socket.create_connection((address, 443), 10)
    sock.sendall(b"hold")
    assert sock.recv(16)
    return sock


def until_end(sock: socket.socket, seconds: float) -> float | None:
    """Milliseconds until a client that only reads learns that it is over; None when it still gets data."""
    start = time.monotonic()
    sock.settimeout(seconds)
    with contextlib.suppress(OSError):
        while (passed := time.monotonic() - start) < seconds:
            if not sock.recv(4096):
                return passed * 1000
        return None
    passed = time.monotonic() - start
    return None if passed >= seconds else passed * 1000


@pytest.mark.parametrize("address", [LISTED4, LISTED6])
def test_a_revoked_connection_ends_at_once(backend, wire, address):
    def body():
        more = RULESET.static | {element("192.0.2.9"), element("2001:db8:2:9::9")}
        Enforcer(backend()).enforce(Ruleset(WARDEN, static=more))
        held, kept = hold(address), hold("192.0.2.9" if "." in address else "2001:db8:2:9::9")
        without = Ruleset(WARDEN, static=more - {one for one in more if ip_address(address) in one.network})
        Enforcer(backend()).enforce(without)
        alive = until_end(held, 0.3)
        cut = conntrack.cut_where(lambda flow: flow.destination == ip_address(address))
        return alive, until_end(held, 5.0), until_end(kept, 0.3), cut, attempt("tcp", address)

    alive, ended, kept, cut, again = wire.do(body)
    assert alive is None, "negative control: a rule that went does not end what is established"
    assert ended is not None
    assert ended < 900  # 0.1 ms on an idle machine; by itself it would wait for ever
    assert kept is None, "the connection to the neighbour goes on"
    assert [(str(flow.destination), flow.dport, flow.proto) for flow in cut.flows] == [(address, 443, "tcp")]
    assert cut.sockets == 1
    assert again.refused_at_once


def test_cut_without_socket_destruction_refuses_the_next_packet(backend, wire, monkeypatch):
    """As on a kernel without CONFIG_INET_DIAG_DESTROY."""

    def unsupported(diag, flow):
        raise conntrack.NetlinkRefusal(95)

    monkeypatch.setattr(conntrack, "_destroy", unsupported)

    def body():
        made = armed(backend)
        held = hold(LISTED4)
        Enforcer(made).enforce(Ruleset(WARDEN))
        cut = conntrack.cut_where(lambda flow: flow.dport == 443)
        with contextlib.suppress(OSError):
            held.send(b"more")
        return cut, until_end(held, 10.0)

    cut, ended = wire.do(body)
    assert (cut.destroys, cut.sockets, len(cut.flows)) == (False, 0, 1)
    assert ended is not None


def test_a_socket_that_cannot_be_destroyed_spares_no_other(backend, wire, monkeypatch):
    """As with one in TIME_WAIT on older kernels: a session could leave one behind on purpose."""
    destroy, first = conntrack._destroy, []

    def reluctant(diag, flow):
        first.append(flow)
        if len(first) == 1:
            raise conntrack.NetlinkRefusal(95)
        return destroy(diag, flow)

    monkeypatch.setattr(conntrack, "_destroy", reluctant)

    def body():
        made = armed(backend)
        held = [hold(LISTED4), hold(LISTED4)]
        Enforcer(made).enforce(Ruleset(WARDEN))
        cut = conntrack.cut_where(lambda flow: flow.dport == 443)
        return cut, [until_end(one, 2.0) for one in held]

    cut, ended = wire.do(body)
    assert (cut.destroys, cut.sockets, len(cut.flows)) == (True, 1, 2)
    assert sum(one is None for one in ended) == 1, "it learns with its next packet"


def test_udp_flows_are_cut_and_destinations_seen(backend, wire):
    def body():
        made = armed(backend)
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((LISTED4, 443))
        sock.send(b"one")
        sock.recv(16)
        held = hold(LISTED6)
        used = conntrack.destinations()
        Enforcer(made).enforce(Ruleset(WARDEN))
        sock.send(b"two")
        sock.settimeout(10)
        still = sock.recv(16)
        conntrack.cut_where(lambda flow: True)
        try:
            sock.send(b"three")
        except OSError as error:
            outcome = error.errno
        else:
            outcome = 0
        held.close()
        return used, still, outcome, conntrack.destinations()

    used, still, outcome, after = wire.do(body)
    assert used == {(ip_address(LISTED4), "udp", 443), (ip_address(LISTED6), "tcp", 443)}
    assert still == b"two", "negative control: established goes on"
    assert outcome == 1, "EPERM: refused"
    assert after == set()


def test_an_unchanged_range_never_misses_a_packet_of_a_wider_set(backend, wire):
    """Growing and shrinking by thousands of elements beside one that stays."""

    def body():
        enforcer = Enforcer(backend())
        small = frozenset({element(LISTED4)})
        many = small | {element(f"192.{a}.{b}.0/24") for a in range(10, 20) for b in range(200)}
        outcomes = []
        for number in range(6):
            enforcer.enforce(Ruleset(WARDEN, static=(many, small)[number % 2]))
            outcomes.append(tries([("tcp", LISTED4)])[0].outcome)
        return outcomes

    assert wire.do(body) == ["open"] * 6


def test_a_network_may_be_named_twice_with_different_lengths(backend, wire):
    wide, narrow = element("203.0.113.0/24"), element("203.0.113.9/32")

    def body():
        enforcer = Enforcer(backend())
        enforcer.enforce(Ruleset(WARDEN, static=frozenset({wide, element("203.0.113.128/25", 80)})))
        first = tries([("tcp", "203.0.113.200"), ("tcp", "203.0.113.200", 80), ("tcp", "203.0.113.1", 80)])
        enforcer.enforce(Ruleset(WARDEN, static=frozenset({narrow})))
        return first, tries([("tcp", LISTED4), ("tcp", "203.0.113.200")])

    first, second = wire.do(body)
    assert [one.outcome for one in first[:2]] == ["open", "open"]
    assert first[2].refused_at_once
    assert second[0].outcome == "open"
    assert second[1].refused_at_once
