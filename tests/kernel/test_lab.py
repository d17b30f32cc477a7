"""The lab does what its users rely on: it counts what leaves, misbehaves on request and goes without a trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import box as boxes
from tests.support import namespaces
from tests.support.box import Box, BoxError
from tests.support.https_server import META, Meta
from tests.support.lab import ROOT, Lab
from tests.support.namespaces import Family, LabError
from tests.support.remote import META_ADDRESS, RESOLVER4, RESOLVER6, SILENT4, THIRD4
from tests.support.zone import Entry, Fault

pytestmark = pytest.mark.kernel

# A client of its own in the box's namespace: asks once, prints what came as JSON.
CLIENT = """
import json, sys
import dns.exception, dns.flags, dns.message, dns.query, dns.rcode
server, name, kind, transport, timeout = sys.argv[1:6]
query = dns.message.make_query(name, kind, use_edns=transport != "udp-plain")
try:
    ask = dns.query.tcp if transport == "tcp" else dns.query.udp
    answer = ask(query, server, timeout=float(timeout))
except (dns.exception.DNSException, EOFError, OSError) as error:
    print(json.dumps({"error": type(error).__name__}))
else:
    print(json.dumps({
        "rcode": dns.rcode.to_text(answer.rcode()),
        "tc": bool(answer.flags & dns.flags.TC),
        "answer": [[str(r.name), dns.rdatatype.to_text(r.rdtype), r.ttl, sorted(map(str, r))] for r in answer.answer],
        "soa": any(r.rdtype == 6 for r in answer.authority),
    }))
"""


def ask(
    lab: Lab, name: str, kind: str = "A", *, server: str = RESOLVER4, transport: str = "udp", timeout: float = 5
) -> dict:
    done = lab.exec([sys.executable, "-c", CLIENT, server, name, kind, transport, str(timeout)])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def addresses(answer: dict) -> list[str]:
    return [value for _, kind, _, values in answer["answer"] if kind in {"A", "AAAA"} for value in values]


def send(lab: Lab, code: str) -> None:
    done = lab.exec([sys.executable, "-c", f"import socket\n{code}"])
    assert done.returncode == 0, done.stderr


# Packet log


def test_new_lab_is_quick_and_has_seen_nothing() -> None:
    took = []
    while not took or (min(took) >= 2.0 and len(took) < 5):  # other processes share these two cores
        begin = time.monotonic()
        with Lab() as lab:
            took.append(time.monotonic() - begin)
            assert lab.packets() == []
            assert lab.dns.queries() == []
    assert min(took) < 2.0, "0.15 s on an idle machine"


def test_tcp_syn_is_logged_even_when_nobody_listens(shared_lab: Lab) -> None:
    begin = time.monotonic()
    send(shared_lab, "socket.socket().connect_ex(('203.0.113.7', 9))")
    (packet,) = shared_lab.packets(to="203.0.113.7")
    assert (packet.family, packet.src, packet.proto, packet.dport, packet.flags) == (4, "198.51.100.2", "tcp", 9, "S")
    assert begin < packet.at < time.monotonic()
    assert shared_lab.packets(to="203.0.113.8") == []
    assert shared_lab.packets(ignore=["203.0.113.7"]) == []
    shared_lab.clear()
    assert shared_lab.packets() == []


@pytest.mark.parametrize("target", ["203.0.113.9", "169.254.169.254", "10.9.9.9", "192.168.7.7", "198.18.0.1"])
def test_udp_is_logged_wherever_it_goes(shared_lab: Lab, target: str) -> None:
    send(shared_lab, f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('{target}', 4000))")
    (packet,) = shared_lab.packets(to=target)
    assert (packet.proto, packet.dport) == ("udp", 4000)


def test_ipv6_is_logged_and_neighbour_discovery_is_not(shared_lab: Lab) -> None:
    send(shared_lab, "s = socket.socket(socket.AF_INET6); s.connect(('2001:db8:2::7', 7)); s.send(b'x'); s.recv(1)")
    assert {(p.family, p.dst, p.proto, p.dport) for p in shared_lab.packets()} == {(6, "2001:db8:2::7", "tcp", 7)}


def test_icmp_of_both_families_is_logged(shared_lab: Lab) -> None:
    send(
        shared_lab,
        "s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\n"
        "s.sendto(bytes([8, 0, 0xF7, 0xFE, 0, 1, 0, 0]), ('203.0.113.7', 0))\n"
        "s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58)\n"
        "s.sendto(bytes([128, 0, 0, 0, 0, 1, 0, 0]), ('2001:db8:2::7', 0))",
    )
    assert [(p.proto, p.kind) for p in shared_lab.packets()] == [("icmp", 8), ("icmp6", 128)]


def test_a_thousand_packets_are_all_counted(shared_lab: Lab) -> None:
    send(
        shared_lab,
        "s = socket.socket(type=socket.SOCK_DGRAM)\nfor i in range(1000): s.sendto(b'x', ('203.0.113.7', 9))",
    )
    assert len(shared_lab.packets(to="203.0.113.7", proto="udp", port=9)) == 1000


# Nothing gets out


def test_internet_has_no_way_out(shared_lab: Lab) -> None:
    for family in ("-4", "-6"):
        routes = namespaces.run(["ip", "-n", shared_lab.internet, family, "route", "show", "default"])
        assert routes == ""
    links = json.loads(namespaces.run(["ip", "-n", shared_lab.internet, "-j", "link"]))
    assert [link["ifname"] for link in links] == ["lo", "eth0"]
    code = "import socket; print(socket.socket(type=socket.SOCK_DGRAM).connect_ex(('198.18.0.1', 9)))"
    done = namespaces.run(["ip", "netns", "exec", shared_lab.internet, sys.executable, "-c", code])
    assert int(done) == 101, "ENETUNREACH"


# DNS


def test_records_of_many_types(shared_lab: Lab) -> None:
    records = {
        "A": ["203.0.113.1", "203.0.113.2"],
        "AAAA": "2001:db8:2::1",
        "TXT": '"hello"',
        "HTTPS": "1 . alpn=h2 ipv4hint=203.0.113.1",
        "SRV": "1 2 443 target.example.",
    }
    shared_lab.dns.set("many.example", records, ttl=7)
    for kind, data in records.items():
        answer = ask(shared_lab, "many.example", kind)
        (found,) = answer["answer"]
        assert found[1:3] == [kind, 7]
        assert len(found[3]) == (len(data) if isinstance(data, list) else 1)
    assert [q.type for q in shared_lab.dns.queries("many.example")] == list(records)


def test_case_of_the_question_comes_back(shared_lab: Lab) -> None:
    assert ask(shared_lab, "SiTe.ExAmPlE")["answer"][0][0] == "SiTe.ExAmPlE."
    assert [query.name for query in shared_lab.dns.queries()] == ["site.example"]


def test_rotating_answers(shared_lab: Lab) -> None:
    pool = [f"203.0.113.{n}" for n in range(100, 110)]
    shared_lab.dns.set("pool.example", {"A": pool}, pick=3)
    seen = [addresses(ask(shared_lab, "pool.example")) for _ in range(4)]
    assert all(len(each) == 3 for each in seen)
    assert {address for each in seen for address in each} == set(pool)


def test_cname_chain_in_order(shared_lab: Lab) -> None:
    shared_lab.dns.set("a.example", {"CNAME": "b.example."})
    shared_lab.dns.set("b.example", {"CNAME": "c.example."})
    shared_lab.dns.set("c.example", {"A": "203.0.113.3"})
    answer = ask(shared_lab, "a.example")["answer"]
    assert [(owner, kind) for owner, kind, _, _ in answer] == [
        ("a.example.", "CNAME"), ("b.example.", "CNAME"), ("c.example.", "A"),
    ]  # fmt: skip


def test_wildcard_and_empty_parent(shared_lab: Lab) -> None:
    shared_lab.dns.set("*.cdn.example", {"A": "203.0.113.4"})
    assert addresses(ask(shared_lab, "any.thing.cdn.example")) == ["203.0.113.4"]
    parent = ask(shared_lab, "cdn.example")
    assert (parent["rcode"], parent["answer"], parent["soa"]) == ("NOERROR", [], True)


@pytest.mark.parametrize(
    ("fault", "udp", "tcp"),
    [
        (Fault.NXDOMAIN, {"rcode": "NXDOMAIN"}, {"rcode": "NXDOMAIN"}),
        (Fault.NODATA, {"rcode": "NOERROR", "answer": [], "soa": True}, {"rcode": "NOERROR", "answer": []}),
        (Fault.SERVFAIL, {"rcode": "SERVFAIL"}, {"rcode": "SERVFAIL"}),
        (Fault.REFUSED, {"rcode": "REFUSED"}, {"rcode": "REFUSED"}),
        (Fault.SILENT, {"error": "Timeout"}, {"error": "Timeout"}),
        (Fault.TRUNCATED, {"tc": True, "answer": []}, {"tc": False, "rcode": "NOERROR"}),
        (Fault.TRUNCATED_DEAD, {"tc": True, "answer": []}, {"error": "EOFError"}),
        (Fault.GARBAGE, {"error": "ShortHeader"}, {}),
        (Fault.WRONG_ID, {"error": "BadResponse"}, {"error": "BadResponse"}),
        (Fault.WRONG_QUESTION, {"error": "BadResponse"}, {"error": "BadResponse"}),
        (Fault.SPOOFED, {"error": "UnexpectedSource"}, {"rcode": "NOERROR"}),
    ],
)
def test_faults_of_a_name(shared_lab: Lab, fault: Fault, udp: dict, tcp: dict) -> None:
    shared_lab.dns.set("bad.example", {"A": "203.0.113.5"}, fault=fault)
    for transport, expected in (("udp", udp), ("tcp", tcp)):
        got = ask(shared_lab, "bad.example", transport=transport, timeout=0.4 if fault is Fault.SILENT else 5)
        if fault is Fault.GARBAGE:
            assert "error" in got
        else:
            assert {key: got.get(key) for key in expected} == expected, transport
    shared_lab.dns.set("bad.example", {"A": "203.0.113.5"})
    assert addresses(ask(shared_lab, "bad.example")) == ["203.0.113.5"], "and without the fault it answers"


def test_fault_for_one_type_only(shared_lab: Lab) -> None:
    shared_lab.dns.set("half.example", {"A": "203.0.113.5"}, fault=Fault.NXDOMAIN, fault_types=("AAAA",))
    assert ask(shared_lab, "half.example")["rcode"] == "NOERROR"
    assert ask(shared_lab, "half.example", "AAAA")["rcode"] == "NXDOMAIN"


def test_delay_and_stray_records(shared_lab: Lab) -> None:
    shared_lab.dns.set(
        "slow.example", {"A": "203.0.113.5"}, delay=0.2, stray=(("victim.example", "A", "203.0.113.66"),)
    )
    begin = time.monotonic()
    answer = ask(shared_lab, "slow.example")
    assert time.monotonic() - begin > 0.2
    assert [owner for owner, *_ in answer["answer"]] == ["slow.example.", "victim.example."]


def test_many_records_are_truncated_over_udp_and_whole_over_tcp(shared_lab: Lab) -> None:
    shared_lab.dns.set("big.example", {"A": [f"203.0.113.{n}" for n in range(120)]})
    assert ask(shared_lab, "big.example")["tc"] is True
    assert len(addresses(ask(shared_lab, "big.example", transport="tcp"))) == 120
    shared_lab.dns.set("some.example", {"A": [f"203.0.113.{n}" for n in range(40)]})
    assert ask(shared_lab, "some.example")["tc"] is False, "fits the 1232 octets of EDNS"
    assert ask(shared_lab, "some.example", transport="udp-plain")["tc"] is True, "does not fit 512"


def test_servers_by_address(shared_lab: Lab) -> None:
    assert addresses(ask(shared_lab, "site.example", server=THIRD4)) == ["203.0.113.10"]
    assert addresses(ask(shared_lab, "site.example", "AAAA", server=RESOLVER6)) == ["2001:db8:2::10"]
    assert ask(shared_lab, "site.example", server=SILENT4, timeout=0.4) == {"error": "Timeout"}
    shared_lab.dns.server(RESOLVER4, fault=Fault.SERVFAIL)
    assert ask(shared_lab, "site.example")["rcode"] == "SERVFAIL"
    assert {query.server for query in shared_lab.dns.queries()} == {THIRD4, RESOLVER6, SILENT4, RESOLVER4}


def test_unreadable_data_is_refused_and_changes_nothing(shared_lab: Lab) -> None:
    with pytest.raises(LabError, match=r"dns\.exception\.SyntaxError"):
        shared_lab.dns.load([Entry("x.example", {"A": ("not-an-address",)})])
    assert ask(shared_lab, "x.example")["rcode"] == "NXDOMAIN"


# Web and echo


def curl(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    return lab.exec(["curl", "-sS", "-m", "15", "--cacert", str(lab.ca_file), *arguments])


def test_https_has_a_certificate_for_each_name_and_address(shared_lab: Lab) -> None:
    for name, address in (("a.example", "203.0.113.3"), ("b.example", "[2001:db8:2::3]")):
        done = curl(shared_lab, "--resolve", f"{name}:443:{address}", f"https://{name}/")
        assert done.stdout == f"hello from {name}\n", done.stderr
    assert curl(shared_lab, "https://203.0.113.77/").stdout == "hello from 203.0.113.77\n"
    assert shared_lab.exec(["curl", "-sS", "https://203.0.113.77/"]).returncode == 60, "nobody else trusts the lab"
    assert [request.scheme for request in shared_lab.web.requests("a.example")] == ["https"]


def test_meta_in_every_manner(shared_lab: Lab) -> None:
    def meta(patience: str = "15") -> subprocess.CompletedProcess[str]:
        where = ["--resolve", f"api.github.com:443:{META_ADDRESS}", "https://api.github.com/meta"]
        return curl(shared_lab, "-m", patience, "-o", "-", "-w", "%{http_code}", *where)

    assert json.loads(meta().stdout.removesuffix("200")) == META
    shared_lab.web.meta(Meta.MALFORMED)
    with pytest.raises(ValueError):
        json.loads(meta().stdout.removesuffix("200"))
    shared_lab.web.meta(Meta.ERROR)
    assert meta().stdout.endswith("500")
    shared_lab.web.meta(Meta.SILENT)
    assert meta("1").returncode == 28
    shared_lab.web.meta(Meta.CUSTOM, body={"web": ["203.0.113.0/28"]})
    assert meta().stdout == '{"web": ["203.0.113.0/28"]}200'


def test_slow_download_goes_on(shared_lab: Lab) -> None:
    argv = ["ip", "netns", "exec", shared_lab.netns, "curl", "-sSN", "http://203.0.113.9/drip?rate=2000"]
    begin = time.monotonic()
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as download:
        assert download.stdout is not None
        assert len(download.stdout.read(1000)) == 1000
        assert 0.3 < time.monotonic() - begin < 15
        download.kill()


@pytest.mark.parametrize("port", [7, 22, 5000, 8443])
def test_echo(shared_lab: Lab, port: int) -> None:
    send(
        shared_lab,
        f"s = socket.create_connection(('192.0.2.9', {port})); s.send(b'ab'); assert s.recv(9) == b'ab'",
    )


def test_udp_echo_answers_from_the_address_asked(shared_lab: Lab) -> None:
    for family, address in (("AF_INET", "203.0.113.99"), ("AF_INET6", "2001:db8:2::99")):
        send(
            shared_lab,
            f"s = socket.socket(socket.{family}, socket.SOCK_DGRAM); s.settimeout(10)\n"
            f"s.connect(('{address}', 5000)); s.send(b'ab'); assert s.recv(9) == b'ab'",
        )


# Variants


@pytest.mark.parametrize(
    ("family", "v4", "v6"), [(Family.V4, True, False), (Family.V6, False, True), (Family.SYSCTL, True, False)]
)
def test_families(family: Family, v4: bool, v6: bool) -> None:
    with Lab(family) as lab:
        assert ["rcode" in ask(lab, "site.example", server=server) for server in (RESOLVER4, RESOLVER6)] == [v4, v6]
        loopback = "0" * 31 + "1" in lab.exec(["cat", "/proc/net/if_inet6"]).stdout
        assert loopback is (family is not Family.SYSCTL)


# Box: a stand-in PID 1 is enough to see what a box gives

STAND_IN = (
    "/bin/sh",
    "-c",
    """trap 'exit 7' TERM; mkdir -p /run/initd; echo '{"event": "up"}' >&2; touch /run/initd/ready
    while :; do sleep 0.05; done""",
)


@pytest.fixture
def stand_in(shared_lab: Lab) -> Box:
    box = shared_lab.box(argv=STAND_IN, policy="site.example\n", env={"INITD_VERIFY": "off"})
    box.start()
    return box


def test_box_is_pid_1_with_a_container_s_capabilities(stand_in: Box) -> None:
    assert stand_in.read("/proc/1/cmdline").startswith("/bin/sh")
    status = dict(line.split(":\t") for line in stand_in.read("/proc/1/status").splitlines() if ":\t" in line)
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(status[name], 16) == sum(1 << boxes.CAPABILITIES[cap] for cap in boxes.DEFAULT_CAPABILITIES)
    assert status["NoNewPrivs"] == "1"
    assert "INITD_VERIFY=off" in stand_in.read("/proc/1/environ").split("\0")
    assert stand_in.logs().events == [{"event": "up"}]
    assert stand_in.exec(["sh", "-c", "ls -d /proc/[0-9]* | wc -l"]).stdout.strip() in {"4", "5", "6"}


def test_session_is_what_the_shims_make(stand_in: Box) -> None:
    done = stand_in.exec(["sh", "-c", "id -u; id -g; id -G; pwd; echo $HOME; grep -E '^(Cap|NoNew)' /proc/self/status"])
    assert done.stdout.split()[:5] == ["501", "501", "501", "/workspace", "/home/claude"]
    assert {line.split()[1] for line in done.stdout.splitlines() if line.startswith("Cap")} == {"0" * 16}
    assert "NoNewPrivs:\t1" in done.stdout
    assert stand_in.exec(["id", "-u"], user="root").stdout == "0\n"
    assert stand_in.exec(["id", "-u"], user=(boxes.WARDEN_UID, boxes.WARDEN_UID)).stdout == "990\n"
    assert stand_in.exec(["sh", "-c", "exit 3"]).returncode == 3


def test_policy_is_read_only_inside_and_live_from_outside(stand_in: Box) -> None:
    path = "/workspace/.aidevcontainer/allowed-domains.txt"
    for user, reason in (("session", "Permission denied"), ("root", "Read-only")):
        assert reason in stand_in.exec(["sh", "-c", f"echo x >>{path}"], user=user).stderr
    stand_in.write_policy("other.example\n")
    assert stand_in.exec(["cat", path]).stdout == "other.example\n"
    assert stand_in.exec(["sh", "-c", "echo x >/workspace/file; cat /workspace/file"]).stdout == "x\n"


def test_writable_policy_on_request(shared_lab: Lab) -> None:
    box = shared_lab.box(argv=STAND_IN, policy="a.example\n", policy_writable=True)
    box.start()
    path = "/workspace/.aidevcontainer/allowed-domains.txt"
    assert box.exec(["sh", "-c", f"echo b.example >>{path}; cat {path}"]).stdout == "a.example\nb.example\n"


def test_host_files_are_out_of_reach(stand_in: Box) -> None:
    done = stand_in.exec(["sh", "-c", "touch /usr/x /etc/passwd.new /.host/etc/x; ls /run /home"], user="root")
    assert done.stderr.count("Read-only") == 2, "/etc itself is a tmpfs of the box"
    assert done.stdout.split() == ["/home:", "claude", "/run:", "initd"]
    assert not Path("/etc/passwd.new").exists()
    assert stand_in.exec(["sh", "-c", "echo nameserver 127.0.0.1 >/etc/resolv.conf"], user="root").returncode == 0
    assert "127.0.0.1" in stand_in.read("/etc/resolv.conf")


def test_product_is_readable_for_every_user(stand_in: Box) -> None:
    for user in ("session", "root", (boxes.WARDEN_UID, boxes.WARDEN_UID)):
        done = stand_in.exec([str(boxes.product.PYTHON), "-c", "import initd, dns; print(initd.__file__)"], user=user)
        assert done.stdout.strip() == str(ROOT / "initd" / "__init__.py"), done.stderr


def test_what_a_box_sends_is_logged(stand_in: Box, shared_lab: Lab) -> None:
    shared_lab.clear()
    done = stand_in.exec(["curl", "-sS", "https://site.example/"])
    assert done.stdout == "hello from site.example\n", done.stderr
    assert shared_lab.packets(port=443)
    assert shared_lab.dns.queries("site.example")


def test_stop_tells_code_and_time_and_start_works_again(stand_in: Box) -> None:
    stopped = stand_in.stop()
    assert stopped.code == 7
    assert stopped.seconds < 5
    assert stand_in.start() < 15
    stand_in.signal_from_outside(signal.SIGKILL)
    assert stand_in.wait() == -signal.SIGKILL


def test_end_before_ready_shows_the_log(shared_lab: Lab) -> None:
    box = shared_lab.box(argv=("/bin/sh", "-c", "echo why >&2; exit 78"))
    with pytest.raises(BoxError, match=r"78(.|\n)*why"):
        box.start()


def test_killing_a_session_from_outside_ends_it_inside(stand_in: Box) -> None:
    running = ["pgrep", "-x", "-f", "sleep 1000"]
    until = time.monotonic() + 30
    with stand_in.popen(["sleep", "1000"]) as session:
        try:
            while stand_in.exec(running).returncode:
                assert time.monotonic() < until
                time.sleep(0.02)
        finally:
            session.kill()
    while stand_in.exec(running).returncode == 0:
        assert time.monotonic() < until
        time.sleep(0.02)


# No trace


def test_nothing_is_left_even_after_an_error() -> None:
    before = namespaces.leftovers()

    def fail() -> None:
        with Lab() as lab:
            lab.box(argv=STAND_IN).start()
            assert namespaces.leftovers() != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert namespaces.leftovers() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_owner_takes_servers_and_box_along(number: signal.Signals) -> None:
    code = (
        "import time\nfrom tests.support.lab import Lab\nfrom tests.kernel.test_lab import STAND_IN\n"
        "with Lab() as lab:\n    box = lab.box(argv=STAND_IN); box.start()\n"
        "    print(lab.netns, lab.internet, flush=True)\n    time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as owner:
        assert owner.stdout is not None
        names = owner.stdout.readline().decode().split()
        assert len(names) == 2
        os.kill(owner.pid, number)
    until = time.monotonic() + 30
    alive = [name for name in names if (namespaces.NETNS_DIRECTORY / name).exists()]
    assert bool(alive) is (number == signal.SIGKILL), "an interrupt cleans up at once"
    while any(namespaces.processes(name) for name in alive):
        assert time.monotonic() < until, "processes outlived their owner"
        time.sleep(0.02)
    namespaces.remove_stale()
    assert not [name for name in names if (namespaces.NETNS_DIRECTORY / name).exists()]
