"""What is particular to nftables: its listing, its transactions, its neighbours, learned elements over netlink."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_network
from math import inf
from pathlib import Path

import pytest

from initd.core.ruleset import Element, Endpoint, Ruleset
from initd.errors import KernelError, PrivilegeError
from initd.kernel import nftelements, nftrules
from initd.kernel.nftables import Nftables
from initd.kernel.select import pick

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
]

CASES = Path(__file__).parent.parent / "cases" / "rules"
WARDEN = 990
SESSION = 501
PUBLIC4, PUBLIC6 = "203.0.113.9", "2001:db8::9"
OTHER4, OTHER6 = "203.0.113.10", "2001:db8::10"
PRIVATE4 = "10.77.0.9"
BOX4, BOX6 = "192.0.2.2", "2001:db8:1::2"
PEER4, PEER6 = "192.0.2.1", "2001:db8:1::1"
LISTED, UNLISTED = 443, 444


def _setns(name):
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(descriptor)


class Namespace:
    """A network namespace with one thread inside it: what `do` runs, and the sockets it makes, live there."""

    def __init__(self, name):
        self.name = name
        subprocess.run(["ip", "netns", "add", name], check=True)
        self._pool = ThreadPoolExecutor(1, initializer=_setns, initargs=(name,))

    def do(self, function, *arguments):
        return self._pool.submit(function, *arguments).result(timeout=60)

    def run(self, *command, **options):
        options = {"check": True, "capture_output": True, "text": True, **options}
        return self.do(lambda: subprocess.run(command, **options))  # noqa: PLW1510  # check is in options

    def nft(self, *command):
        return self.run("nft", *command).stdout

    def remove(self):
        self._pool.shutdown()
        subprocess.run(["ip", "netns", "del", self.name], check=False)


class Pair:
    """`box` and `peer`, joined; the peer owns every public address and answers TCP and UDP on both ports."""

    def __init__(self, tag):
        self.box, self.peer = Namespace(f"nftb{tag}"), Namespace(f"nftp{tag}")
        self._open, self._threads = [], []
        self._stop = threading.Event()

    def connect(self):
        run = self.box.run
        run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", self.peer.name)
        for space, four, six in ((self.box, BOX4, BOX6), (self.peer, PEER4, PEER6)):
            for command in (
                "link set lo up",
                f"addr add {four}/30 dev eth0",
                f"addr add {six}/64 dev eth0 nodad",
                "link set eth0 up",
            ):
                space.run("ip", *command.split())
        for address in (PUBLIC4, OTHER4, PRIVATE4, PUBLIC6, OTHER6):
            self.peer.run("ip", "addr", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))
        run("ip", "route", "add", "default", "via", PEER4)
        run("ip", "-6", "route", "add", "default", "via", PEER6)
        for port in (LISTED, UNLISTED):
            for address in (PUBLIC4, OTHER4, PRIVATE4, PUBLIC6, OTHER6):
                self._serve(address, port)

    def _serve(self, address, port):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET

        def make():
            tcp = socket.socket(family, socket.SOCK_STREAM)
            udp = socket.socket(family, socket.SOCK_DGRAM)
            for sock in (tcp, udp):
                sock.bind((address, port))
            tcp.listen(512)
            return tcp, udp

        tcp, udp = self.peer.do(make)
        self._open += [tcp, udp]
        self._threads.append(threading.Thread(target=self._answer, args=(tcp, udp)))
        self._threads[-1].start()

    def _answer(self, tcp, udp):
        clients = []
        while not self._stop.is_set():
            ready, _, _ = select.select([tcp, udp, *clients], [], [], 0.05)
            for sock in ready:
                if sock is tcp:
                    clients.append(tcp.accept()[0])
                elif sock is udp:
                    data, sender = udp.recvfrom(65536)
                    with contextlib.suppress(OSError):
                        udp.sendto(data, sender)
                else:
                    try:
                        data = sock.recv(65536)
                    except OSError:
                        data = b""
                    if data:
                        sock.send(data)
                    else:
                        sock.close()
                        clients.remove(sock)

    def remove(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for sock in self._open:
            sock.close()
        for space in (self.box, self.peer):
            space.remove()


_COUNT = iter(range(10_000))


@pytest.fixture
def pair():
    made = Pair(f"{os.getpid() % 10_000}x{next(_COUNT)}")
    try:
        made.connect()
        yield made
    finally:
        made.remove()


@pytest.fixture
def box():
    made = Namespace(f"nfts{os.getpid() % 10_000}x{next(_COUNT)}")
    try:
        made.run("ip", "link", "set", "lo", "up")
        yield made
    finally:
        made.remove()


@pytest.fixture
def backend():
    return Nftables()


def element(text, *, port=LISTED, proto="tcp"):
    return Element(ip_network(text), proto, port)


def listed(*texts, **fields):
    return Ruleset(WARDEN, static=frozenset(map(element, texts)), **fields)


RICH = Ruleset(
    WARDEN,
    upstreams=frozenset(
        {Endpoint(ip_address("127.0.0.11")), Endpoint(ip_address(PEER4)), Endpoint(ip_address(PEER6), 5353)}
    ),
    engine_dns=True,
    static=frozenset(
        {
            element("203.0.113.0/24"),
            element("203.0.113.9"),
            element("203.0.113.9", proto="udp"),
            element("2001:db8::/64"),
        }
    ),
    private=frozenset({element("10.77.0.0/16"), element("fd00::/64", port=22)}),
    subnets=frozenset({ip_network("192.0.2.0/30"), ip_network("2001:db8:1::/64"), ip_network("192.0.2.9")}),
)
RULESETS = {
    "empty": Ruleset(WARDEN, log=False),
    "rich": RICH,
    "audit": Ruleset(WARDEN, audit=inf),
}


def tcp(address, port=LISTED, *, timeout=5.0):
    """0 for a connection, else the errno; and how long it took, seconds."""
    start = time.monotonic()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect((address, port))
            code = 0
        except TimeoutError:
            code = errno.ETIMEDOUT
        except OSError as error:
            code = error.errno
    return code, time.monotonic() - start


def udp(address, port=LISTED, *, size=8, timeout=5.0):
    start = time.monotonic()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect((address, port))
            sock.send(b"x" * size)
            code = 0 if len(sock.recv(65536)) == size else -1
        except TimeoutError:
            code = errno.ETIMEDOUT
        except OSError as error:
            code = error.errno
    return code, time.monotonic() - start


REFUSED = {errno.ECONNREFUSED}
PROHIBITED = {errno.EPERM, errno.EHOSTUNREACH, errno.EACCES}
"""How a datagram's refusal reads: from send() when the hook is our own, else from the ICMP or ICMPv6 error."""


def assert_refused(outcome, expected=REFUSED):
    code, seconds = outcome
    assert code in expected
    assert seconds < 0.9  # a SYN that nothing came of is sent again after one second


# --- the listing


@pytest.mark.parametrize("name", RULESETS)
def test_read_is_what_was_expected(box, backend, name):
    box.do(backend.lockdown, WARDEN)
    assert box.do(backend.read) != backend.expect(RULESETS[name])
    box.do(backend.apply, RULESETS[name])
    assert box.do(backend.read) == backend.expect(RULESETS[name])


@pytest.mark.parametrize("name", [*RULESETS, "lockdown"])
def test_the_kernels_listing_is_the_golden_one(box, backend, name):
    box.do(backend.lockdown, WARDEN)
    if name != "lockdown":
        box.do(backend.apply, RULESETS[name])
    golden = CASES / f"{name}.nft"
    listing = box.nft("-n", "list", "table", "inet", "initd").replace(" burst 5 packets", "")  # 1.1 leaves defaults out
    if os.environ.get("INITD_WRITE_GOLDENS"):
        golden.write_text(listing)
    assert listing == golden.read_text()


TAMPERING = {
    "rule added": "insert rule inet initd output accept",
    "rules gone": "flush chain inet initd output",
    "policy": "add chain inet initd output { policy accept; }",
    "foreign chain": "add chain inet initd early { type filter hook output priority -5; }",
    "foreign set": "add set inet initd other { type ipv4_addr; }",
    "element added": "add element inet initd initd4-static { 198.51.100.0/24 . tcp . 80 }",
    "range of ports added": "add element inet initd initd4-static { 198.51.100.0/24 . tcp . 1-65535 }",
    "range of addresses added": "add element inet initd initd4-static { 198.51.100.3-198.51.100.9 . tcp . 80 }",
    "element gone": "delete element inet initd initd4-private { 10.77.0.0/16 . tcp . 443 }",
    "special gone": "delete element inet initd initd4-special { 169.254.0.0/16 }",
    "special smaller": "flush set inet initd initd6-special",
    "dormant": "add table inet initd { flags dormant; }",
    "table gone": "delete table inet initd",
    "everything flushed": "flush ruleset",
}


@pytest.mark.parametrize("what", TAMPERING)
def test_tampering_is_seen_and_repaired_by_apply(box, backend, what):
    box.do(backend.lockdown, WARDEN)
    box.do(backend.apply, RICH)
    box.nft(TAMPERING[what])
    assert box.do(backend.read) != backend.expect(RICH)
    if what.startswith("foreign"):
        return  # a lockdown clears the table; apply leaves what it does not know
    box.do(backend.apply, RICH)
    assert box.do(backend.read) == backend.expect(RICH)


@pytest.mark.parametrize("what", [name for name in TAMPERING if name.startswith("foreign")])
def test_lockdown_replaces_whatever_stood_in_our_table(box, backend, what):
    box.do(backend.apply, RICH)
    box.nft(TAMPERING[what])
    box.do(backend.lockdown, WARDEN)
    box.do(backend.apply, RICH)
    assert box.do(backend.read) == backend.expect(RICH)


def test_a_table_with_other_sets_under_our_names_is_replaced_by_lockdown(box, backend):
    box.nft("add table inet initd; add set inet initd initd4-learned { type ipv4_addr; }")
    with pytest.raises(KernelError, match=r"datatype mismatch|exists"):
        box.do(backend.apply, RICH)
    box.do(backend.lockdown, WARDEN)
    box.do(backend.apply, RICH)


def test_nothing_is_left_after_a_probe_and_a_teardown(box, backend):
    before = box.nft("list", "ruleset")
    probe = box.do(backend.probe)
    assert probe.usable
    assert probe.capabilities.keys() == {
        "ipv4", "ipv6", "sets", "timeouts", "owner", "conntrack", "reject", "source", "nflog",
    }  # fmt: skip
    assert len(probe.missing) == sum(not found for found in probe.capabilities.values())
    assert box.nft("list", "ruleset") == before
    box.do(backend.teardown)
    box.do(backend.lockdown, WARDEN)
    box.do(backend.teardown)
    assert box.nft("list", "ruleset") == before
    assert not box.do(backend.read).rules


# --- packets


def test_established_connections_live_on_and_lockdown_ends_them(pair, backend):
    box = pair.box
    box.do(backend.apply, listed(PUBLIC4))
    with box.do(socket.create_connection, (PUBLIC4, LISTED), 2) as sock:
        box.do(backend.apply, Ruleset(WARDEN))
        sock.send(b"a")
        assert sock.recv(1) == b"a"
        box.do(backend.lockdown, WARDEN)
        sock.send(b"b")
        with pytest.raises(OSError, match=r"reset|refused|timed out"):
            sock.recv(1)


def test_strangers_are_refused_at_once_and_neighbours_let_in(pair, backend):
    def serve(family):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.bind(("", 8000))
        sock.listen()
        return sock

    with pair.box.do(serve, socket.AF_INET6) as server:
        assert server
        assert pair.peer.do(tcp, BOX4, 8000)[0] == 0  # negative control
        pair.box.do(backend.apply, Ruleset(WARDEN))
        assert_refused(pair.peer.do(tcp, BOX4, 8000))
        assert_refused(pair.peer.do(tcp, BOX6, 8000))
        assert_refused(pair.peer.do(udp, BOX4, 8000), PROHIBITED)
        assert_refused(pair.peer.do(udp, BOX6, 8000), PROHIBITED)
        assert pair.box.do(backend.counters).refused["input"] >= 4
        subnets = frozenset({ip_network("192.0.2.0/30"), ip_network("2001:db8:1::/64")})
        pair.box.do(backend.apply, Ruleset(WARDEN, subnets=subnets))
        assert pair.peer.do(tcp, BOX4, 8000)[0] == 0
        assert pair.peer.do(tcp, BOX6, 8000)[0] == 0


def test_fragments_and_extension_headers_do_not_slip_past(pair, backend):
    box = pair.box

    def raw_syn(address, port, *, options):
        """A SYN behind a hop-by-hop header, as root with a raw socket."""
        header = (
            (40_000).to_bytes(2, "big") + port.to_bytes(2, "big") + bytes(8) + bytes([0x50, 2]) + b"\x20\x00" + bytes(4)
        )
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_TCP) as sock:
            if options:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_HOPOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_CHECKSUM, 16)
            with contextlib.suppress(PermissionError):
                sock.sendto(header, (address, 0))

    def arrived(address):
        sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        sniffer.bind(("eth0", 3))
        sniffer.settimeout(0.5)
        return sniffer

    def count(sniffer, address):
        wanted, found = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address), 0
        with contextlib.suppress(TimeoutError):
            while True:
                found += wanted in sniffer.recv(65536)[14:54]
        return found

    rules = Ruleset(
        WARDEN, static=frozenset({element(PUBLIC4, proto="udp"), element(PUBLIC6, proto="udp"), element(PUBLIC6)})
    )
    assert box.do(udp, OTHER6)[0] == 0
    with pair.peer.do(arrived, None) as sniffer:
        box.do(lambda: raw_syn(OTHER6, UNLISTED, options=True))
        assert count(sniffer, OTHER6) > 0  # negative control
        box.do(backend.apply, rules)
        for address in (PUBLIC4, PUBLIC6):
            assert box.do(lambda where=address: udp(where, size=4000))[0] == 0
        count(sniffer, OTHER6)
        box.do(lambda: raw_syn(PUBLIC6, LISTED, options=True))
        assert count(sniffer, PUBLIC6) > 0
        for address in (OTHER4, OTHER6):
            assert box.do(lambda where=address: udp(where, size=4000, timeout=2))[0] != 0
            assert count(sniffer, address) == 0
        for options in (True, False):
            box.do(lambda flag=options: raw_syn(OTHER6, LISTED, options=flag))
            box.do(lambda flag=options: raw_syn(PUBLIC6, UNLISTED, options=flag))
        assert count(sniffer, OTHER6) == 0


@pytest.mark.parametrize("family", ["ipv4 only", "ipv6 disabled", "ipv6 only"])
def test_namespaces_with_one_family(pair, backend, family):
    box = pair.box
    if family == "ipv6 disabled":
        box.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
    else:
        box.run("ip", "-6" if family == "ipv4 only" else "-4", "addr", "flush", "dev", "eth0")
    present, absent = (PUBLIC6, PUBLIC4) if family == "ipv6 only" else (PUBLIC4, PUBLIC6)
    box.do(backend.lockdown, WARDEN)
    box.do(backend.apply, listed(PUBLIC4, PUBLIC6))
    assert box.do(backend.read) == backend.expect(listed(PUBLIC4, PUBLIC6))
    assert box.do(tcp, present)[0] == 0
    assert box.do(tcp, absent)[0] != 0
    assert_refused(box.do(tcp, OTHER6 if ":" in present else OTHER4))


# --- neighbours


def test_foreign_rules_stay_byte_for_byte_the_same(box, backend):
    box.nft("add table ip nat; add chain ip nat output { type nat hook output priority -100; }")
    box.nft("add rule ip nat output ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:41234")
    box.nft("add table inet other { chain output { type filter hook output priority -1; counter accept; }; }")
    legacy = ("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-d", "127.0.0.11", "-j", "ACCEPT")
    box.run(*legacy)

    def snapshot():
        saved = box.run("iptables-legacy-save").stdout
        tables = [box.nft("-a", "list", "table", *name.split()) for name in ("ip nat", "inet other")]
        return [line for line in saved.splitlines() if not line.startswith("#")], tables

    before = snapshot()
    box.do(backend.probe)
    box.do(backend.lockdown, WARDEN)
    assert snapshot() == before
    box.do(backend.apply, RICH)
    box.do(backend.learn, [(element(PUBLIC4), 60)])
    assert snapshot() == before
    box.do(backend.teardown)
    assert snapshot() == before


def test_a_foreign_accept_does_not_open_ours(pair, backend):
    box = pair.box
    box.do(backend.apply, Ruleset(WARDEN))
    box.nft("add table inet other { chain output { type filter hook output priority -10; accept; }; }")
    box.nft("add table inet late { chain output { type filter hook output priority 10; accept; }; }")
    assert_refused(box.do(tcp, PUBLIC4))


def test_emptied_chains_are_shut(pair, backend):
    box = pair.box
    box.do(backend.apply, listed(PUBLIC4))
    assert box.do(tcp, PUBLIC4)[0] == 0
    box.nft("flush table inet initd")
    assert box.do(lambda: tcp(PUBLIC4, timeout=0.3))[0] != 0


# --- learned elements


def test_learning_refreshes_up_and_down(box, backend):
    box.do(backend.apply, Ruleset(WARDEN))
    members = [element(PUBLIC4), element(PUBLIC4, proto="udp"), element(PUBLIC6)]
    for seconds in (60, 600, 30):
        box.do(backend.learn, [(member, seconds) for member in members])
        learned = box.do(backend.learned)
        assert learned.keys() == set(members)
        assert all(seconds - 10 < left <= seconds for left in learned.values())
    box.do(backend.forget, [*members[:2], element(OTHER4)])
    assert box.do(backend.learned).keys() == {members[2]}
    box.do(backend.learn, [])
    box.do(backend.forget, [])


def test_many_in_one_call(box, backend):
    box.do(backend.apply, Ruleset(WARDEN))
    members = [element(f"198.51.{number >> 8}.{number & 255}") for number in range(3000)]
    box.do(backend.learn, [(member, 60) for member in members])
    assert box.do(backend.learned).keys() == set(members)
    box.do(backend.forget, members)
    assert box.do(backend.learned) == {}


def test_learned_survive_apply_but_not_lockdown(box, backend):
    box.do(backend.apply, Ruleset(WARDEN))
    box.do(backend.learn, [(element(PUBLIC4), 60)])
    box.do(backend.apply, RICH)
    box.do(Nftables().apply, listed(OTHER4))  # a restarted warden
    assert element(PUBLIC4) in box.do(backend.learned)
    box.do(backend.lockdown, WARDEN)
    assert box.do(backend.learned) == {}


def test_a_full_or_missing_set_is_an_error_and_passes(box, backend, monkeypatch):
    with pytest.raises(KernelError, match="No such file"):
        box.do(backend.learn, [(element(PUBLIC4), 60)])
    monkeypatch.setattr(nftrules, "LEARNED_MOST", 2)
    box.do(backend.apply, Ruleset(WARDEN))
    many = [(element(PUBLIC4, port=port), 60) for port in range(1, 20)]
    with pytest.raises(KernelError, match="Too many open files"):  # ENFILE
        box.do(backend.learn, many)
    assert box.do(backend.learned) == {}  # a transaction: nothing of it
    box.do(backend.learn, many[:1])
    assert len(box.do(backend.learned)) == 1


def test_learning_goes_on_while_another_thread_applies_and_reads(box, backend):
    box.do(backend.apply, RICH)
    errors, stop, times = [], threading.Event(), []

    def learner():
        _setns(box.name)
        try:
            while not stop.is_set():
                start = time.monotonic()
                backend.learn([(element(PUBLIC4, port=port), 60) for port in (22, 80, 443)])
                times.append(time.monotonic() - start)
                backend.forget([element(PUBLIC4, port=22)])
                time.sleep(0.0005)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=learner)
    thread.start()
    try:
        for round_number in range(60):
            rules = RICH if round_number % 2 else listed(OTHER4)
            box.do(backend.apply, rules)
            assert box.do(backend.read) == backend.expect(rules)
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert len(times) > 60
    assert {element(PUBLIC4, port=80), element(PUBLIC4, port=443)} <= box.do(backend.learned).keys()


# --- reload


def test_reload_loses_no_connection(pair, backend):
    box = pair.box
    rulesets = [listed(PUBLIC4, "198.51.100.0/24"), listed(PUBLIC4, "198.51.99.0/24", OTHER4)]
    box.do(backend.apply, rulesets[0])
    stop, outcomes, leaked = threading.Event(), [], []

    def client():
        _setns(box.name)
        while not stop.is_set():
            outcomes.append(tcp(PUBLIC4)[0])
            leaked.append(tcp(PUBLIC4, UNLISTED)[0])
            time.sleep(0.005)

    thread = threading.Thread(target=client)
    thread.start()
    number, until = 0, time.monotonic() + 60
    while number < 50 or (len(outcomes) <= 80 and time.monotonic() < until):
        box.do(backend.apply, rulesets[number % 2])
        time.sleep(0.015)
        number += 1
    stop.set()
    thread.join()
    assert set(outcomes) == {0}
    assert set(leaked) == {errno.ECONNREFUSED}
    assert len(outcomes) > 80


def test_an_unchanged_element_is_not_touched(box, backend):
    box.do(backend.apply, listed(PUBLIC4, OTHER4))

    def listen():
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
        sock.bind((0, 1 << 6))  # NFNLGRP_NFTABLES
        sock.settimeout(1)
        return sock

    seen = b""
    with box.do(listen) as sock, contextlib.suppress(TimeoutError):
        box.do(backend.apply, listed(PUBLIC4, "198.51.100.7"))
        while True:
            seen += sock.recv(1 << 20)
    assert nftelements.key_of(element("198.51.100.7"))[0] in seen
    assert nftelements.key_of(element(OTHER4))[0] in seen
    assert nftelements.key_of(element(PUBLIC4))[0] not in seen


def test_ranges_inside_ranges(box, backend):
    texts = ("203.0.113.0/24", "203.0.113.0/25", "203.0.113.128/25", "203.0.112.0/23", "203.0.113.7", "203.0.114.0/24")
    for count in range(1, len(texts) + 1):
        rules = listed(*texts[:count])
        box.do(backend.apply, rules)
        assert box.do(backend.read) == backend.expect(rules)
    for count in range(len(texts), 0, -1):
        rules = listed(*texts[:count])
        box.do(backend.apply, rules)
        assert box.do(backend.read) == backend.expect(rules)


# --- privilege and selection

_AS_WARDEN = """
import sys
sys.path.insert(0, sys.argv[1])
from ipaddress import ip_network
from initd.core.ruleset import Element, Ruleset
from initd.errors import InitdError
from initd.kernel.select import pick
member = Element(ip_network("203.0.113.9"), "tcp", 443)
rules = Ruleset(990, static=frozenset({member}))
try:
    backend, _ = pick("nftables")
    backend.lockdown(990)
    backend.apply(rules)
    backend.learn([(member, 60)])
    print(backend.read() == backend.expect(rules), backend.learned(), backend.counters())
except InitdError as error:
    print(error)
    sys.exit(error.code)
"""


def _warden(box, capabilities):
    flags = [f"--{kind}=-all,{capabilities}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    switch = ["setpriv", f"--reuid={WARDEN}", f"--regid={WARDEN}", "--clear-groups", "--no-new-privs", *flags]
    root = str(Path(__file__).parents[2])
    return box.run(*switch, "/usr/bin/python3", "-c", _AS_WARDEN, root, check=False)


def test_works_as_the_wardens_user_with_net_admin_alone(box):
    done = _warden(box, "+net_admin")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("True {Element(")


def test_without_net_admin_it_is_a_matter_of_privilege(box):
    done = _warden(box, "+net_raw")
    assert done.returncode == PrivilegeError.code, done.stdout + done.stderr
    assert "hint: give the container the capability NET_ADMIN" in done.stdout


def picked(choice):
    return pick(choice)[0].name


def test_pick_takes_what_works_and_says_what_lacks(box, backend, monkeypatch):
    assert box.do(picked, "nftables") == "nftables"
    assert box.do(picked, "auto") in {"xtables", "nftables"}

    def nothing(self, name, trial):
        raise KernelError("Operation not supported")

    monkeypatch.setattr(Nftables, "_try", nothing)
    with pytest.raises(KernelError, match=r"nftables: IPv4 filtering.*connection tracking") as caught:
        box.do(pick, "nftables")
    assert caught.value.code == 71


_ROOTLESS = """
import sys
sys.path.insert(0, sys.argv[1])
from ipaddress import IPv4Network
from initd.core.ruleset import Element, Ruleset
from initd.kernel import libnftables
from initd.kernel.nftables import Nftables
backend = Nftables()
backend.lockdown(990)
calls, run = [], libnftables.run
libnftables.run = lambda text, **options: (calls.append(text), run(text, **options))[1]
for count in (10, 5_000, 20):
    elements = frozenset(Element(IPv4Network((0xC0000000 + 8 * i, 30)), "tcp", 443) for i in range(count))
    backend.apply(Ruleset(990, static=elements))
    print(backend.read() == backend.expect(Ruleset(990, static=elements)), len(calls) > 2)
    calls.clear()
"""


def test_in_a_user_namespace_large_policies_go_in_pieces(box):
    command = ("unshare", "-Ur", "-n", "/usr/bin/python3", "-c", _ROOTLESS, str(Path(__file__).parents[2]))
    done = box.run(*command, check=False)
    assert done.stdout.split("\n")[:2] == ["True False", "True True"], done.stderr
    assert done.stdout.split("\n")[2].startswith("True ")


# --- the wire


def test_keys_and_elements_are_each_others_inverse():
    for text in ("0.0.0.0/0", "203.0.113.0/24", "203.0.113.9", "::/0", "2001:db8::/33", "2001:db8::9"):
        for proto in ("tcp", "udp"):
            member = element(text, port=65535, proto=proto)
            assert nftelements.element_of(nftelements.key_of(member)) == member
