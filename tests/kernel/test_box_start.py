"""A start shuts before it opens, survives what the world does to it, and refuses with words one would like to get."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import holding, product
from tests.support.attempts import attempt, attempt_all, client
from tests.support.box import DEFAULT_CAPABILITIES, RUN, STATE, WARDEN_UID, Box, BoxError
from tests.support.https_server import META_HOST, Meta
from tests.support.lab import ROOT, Lab
from tests.support.namespaces import Family
from tests.support.remote import META_ADDRESS, RESOLVER4, RESOLVER6, SILENT4
from tests.support.zone import Entry, Fault

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kernel

CASES = Path(__file__).parents[1] / "cases" / "start"
UNLISTED = ("tcp", "203.0.113.20", 443)

# Sends to an unlisted address every millisecond; when input ends it prints when each got out and when one was refused.
HAMMER = """
import json, select, socket, sys, time
out, refused = [], []
sock = socket.socket(type=socket.SOCK_DGRAM)
print("on", flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    now = time.time()
    try:
        sock.sendto(b"x", ("203.0.113.20", 9))
        out.append(now)
    except PermissionError:
        refused.append(now)
print(json.dumps([out, refused]))
"""


def plain_start(lab: Lab) -> float:
    """Seconds that a start takes here and now when nothing is in its way: what other starts are measured by."""
    box = lab.box(policy=holding.POLICY)
    took = box.start()
    box.close()
    lab.clear()
    return took


def refuses_to_start(box: Box, timeout: float = 60.0) -> str:
    """Exit code and what a person reads, as it is kept in a golden file."""
    box.start(wait=False)
    box.wait(timeout)
    return what_it_said(box)


def what_it_said(box: Box) -> str:
    code = box.wait()
    lines = [line for line in box.logs().text.splitlines() if not line.startswith("{")]
    return f"exit {code}\n" + "".join(f"{line}\n" for line in lines)


def golden(name: str, text: str) -> None:
    """`INITD_GOLDENS=write` writes the files anew; read them before they are committed."""
    path = CASES / f"{name}.txt"
    if os.environ.get("INITD_GOLDENS") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


# Shut first


@pytest.mark.parametrize("backend", ["xtables", "nftables"])
def test_nothing_leaves_before_the_lockdown_but_the_wardens_questions(lab: Lab, backend: str) -> None:
    """Somebody else in the namespace sends all the time; the far side counts."""
    lab.dns.latency(0.3)
    box = lab.box(policy=holding.POLICY, env={"INITD_BACKEND": backend})
    argv = ["ip", "netns", "exec", lab.netns, sys.executable, "-c", HAMMER]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hammer:
        assert hammer.stdout is not None
        assert hammer.stdout.readline() == "on\n"
        until = time.monotonic() + 30
        while len(lab.packets(to="203.0.113.20")) < 30:
            assert time.monotonic() < until
        box.start()
        told, _ = hammer.communicate()
    out, refused = json.loads(told)
    (shut,) = [event for event in box.logs().events if event["event"] == "lockdown.applied"]
    shut_at = datetime.fromisoformat(shut["timestamp"]).timestamp()
    assert len(out) > 20, "negative control: before the lockdown it does get out"
    assert max(out) < shut_at, "not one after"
    assert len(refused) > 100, "and it never stopped trying"
    assert len(lab.packets(to="203.0.113.20")) == len(out)
    others = {(packet.dst, packet.dport) for packet in lab.packets(ignore=["203.0.113.20"])}
    # The verification reaches what is listed, once it is enforced.
    assert others - {(RESOLVER4, 53)} <= {(address, 443) for address in holding.REACHABLE}
    assert {query.name for query in lab.dns.queries()} == {"site.example", "v4.example"}
    early = [packet for packet in lab.packets(ignore=["203.0.113.20", RESOLVER4]) if packet.at < box.exec_time + 0.3]
    assert early == [], "no listed site before its name was answered"


def test_an_open_connection_does_not_outlive_the_lockdown(lab: Lab) -> None:
    """Something in the namespace was connected before; it is judged like everything else."""
    path = str(Path(holding.client_module.__file__))
    argv = ["ip", "netns", "exec", lab.netns, sys.executable, "-I", path, "talk", "203.0.113.20", "22"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as talk:
        assert talk.stdout is not None
        assert talk.stdout.readline() == "open\n"
        until = time.monotonic() + 30
        while len(lab.packets(to="203.0.113.20", port=22)) < 20:  # each byte and each acknowledgement of an echo
            assert time.monotonic() < until
        box = lab.box(policy=holding.POLICY)
        box.start()
        ending = json.loads(talk.communicate(timeout=60)[0])
    assert ending["echoes"] > 5, "negative control: it was open"
    assert ending["error"] in {"ECONNREFUSED", "ECONNRESET", "EPERM", "TIMEOUT"}
    lab.clear()
    time.sleep(0.3)
    left = [packet for packet in lab.packets(to="203.0.113.20") if "R" not in packet.flags]
    assert left == [], "nothing but the reset that answers what still comes in"


# Holds a connection, idle until a line comes; then says whether the far end still answers.
IDLE = """
import socket, sys
sock = socket.create_connection(("203.0.113.7", 7), timeout=3)
print("open", flush=True)
for line in sys.stdin:
    try:
        sock.send(b"x")
        print("echo" if sock.recv(1) else "closed", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


def test_what_the_last_box_let_through_ends_when_the_next_one_does_not(lab: Lab) -> None:
    """Where the network outlives the box: a pod, or a namespace of one's own."""

    def asks() -> bytes:
        assert idle.stdin is not None
        assert idle.stdout is not None
        idle.stdin.write(b"on\n")
        return idle.stdout.readline()

    box = lab.box(policy="203.0.113.7:7\n")
    box.start()
    argv = ["ip", "netns", "exec", lab.netns, sys.executable, "-I", "-c", IDLE]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as idle:
        assert idle.stdout is not None
        assert idle.stdout.readline() == b"open\n"
        box.stop()
        box.start()
        assert asks() == b"echo\n", "negative control"
        box.stop()
        box.write_policy("")
        box.start()
        assert asks() != b"echo\n"
        assert idle.stdin is not None
        idle.stdin.close()


@pytest.mark.parametrize("umask", ["0", "077"])
def test_whatever_the_umask_sessions_read_what_is_theirs_to_know_and_write_nothing(lab: Lab, umask: str) -> None:
    """The next start believes the saved copy of GitHub's ranges, and shims believe `ready`."""
    find = ["find", RUN, STATE, "-type", "f", "-writable"]
    box = lab.box(policy="@github\n", argv=["/bin/sh", "-c", f"umask {umask}; exec {product.INITD}"])
    box.start()
    assert (box.state / "github-meta.json").exists()
    assert box.exec(find).stdout == ""
    assert box.exec(["cat", f"{RUN}/ready"]).returncode == 0
    box.exec(["sh", "-c", f"umask 0; : >{RUN}/x"], user=(WARDEN_UID, WARDEN_UID))
    assert box.exec(find).stdout == f"{RUN}/x\n", "negative control"


def test_a_refused_start_leaves_the_namespace_shut(lab: Lab) -> None:
    box = lab.box(policy="*\n")
    assert holding.without_box(lab, [UNLISTED])[0].error is None
    assert refuses_to_start(box).startswith("exit 78\n")
    assert holding.without_box(lab, [UNLISTED, ("tcp", "203.0.113.10", 443)])[0].error == "ECONNREFUSED"


# Survives


def test_survives_names_that_do_not_answer(lab: Lab) -> None:
    plain = plain_start(lab)
    lab.dns.load(
        [
            Entry("dead.example", fault=Fault.NXDOMAIN),
            Entry("broken.example", {"A": ("203.0.113.31",)}, fault=Fault.SERVFAIL),
            Entry("silent.example", {"A": ("203.0.113.32",)}, fault=Fault.SILENT),
            Entry("garbage.example", {"A": ("203.0.113.33",)}, fault=Fault.GARBAGE),
            Entry("twice.example", {"A": ("203.0.113.34", "203.0.113.34"), "AAAA": ("2001:db8:2::34",) * 2}),
            Entry("one.example", {"A": ("203.0.113.35",)}),
            Entry("two.example", {"A": ("203.0.113.35",)}),
            Entry("nothing.example", {"TXT": ('"x"',)}),
            Entry("loop.example", {"CNAME": ("loop.example",)}),
            Entry("private.example", {"A": ("10.9.9.9",)}),
        ]
    )
    bad = ["dead", "broken", "silent", "garbage", "nothing", "loop", "private"]
    names = [*bad, "twice", "one", "two", "site", "v4", "twice"]
    box = lab.box(policy="".join(f"{name}.example\n" for name in names), env={"INITD_RESOLVE_TIMEOUT": "1.5"})
    assert box.start() < 1.5 + 3 * plain, "the silent one costs the time-out, once"
    good = [("tcp", name, 443) for name in ("twice.example", "one.example", "two.example", "203.0.113.35")]
    assert holding.answering(good, attempt_all(box, good)) == set(good)
    told = {event["name"] for event in box.logs().events if event["event"] == "name.unresolved"}
    assert told == {f"{name}.example" for name in bad}
    tried = attempt_all(box, [("tcp", "dead.example", 443), ("tcp", "203.0.113.31", 443), ("tcp", "10.9.9.9", 443)])
    assert [one.error for one in tried] == ["EAI_NONAME", "ECONNREFUSED", "ECONNREFUSED"]
    lab.dns.set("broken.example", {"A": "203.0.113.31"})
    assert attempt(box, ("tcp", "broken.example", 443)).error is None, "comes back without a restart"


def test_survives_resolvers_that_are_silent(lab: Lab) -> None:
    box = lab.box(policy=holding.POLICY, resolv_conf=f"nameserver {SILENT4}\n", env={"INITD_RESOLVE_TIMEOUT": "1"})
    assert box.start() < 10.0, "of which five are the verification's, asking for a listed name as libc does"
    assert attempt(box, UNLISTED).error == "ECONNREFUSED"
    assert attempt(box, ("tcp", "203.0.113.10", 443)).error == "ECONNREFUSED", "not learned, so not reachable"


def test_starts_with_resolvers_of_both_families(lab: Lab) -> None:
    box = lab.box(policy="site.example\n", resolv_conf=f"nameserver {RESOLVER6}\nnameserver {RESOLVER4}\n")
    box.start()
    assert [one["server"] for one in box.status()["guard"]["upstreams"]] == [RESOLVER6, RESOLVER4]
    assert attempt(box, ("tcp", "site.example", 443)).error is None
    assert {one["name"] for one in json.loads(box.fwctl("verify", "--json").stdout)["checks"]} >= {
        f"udp {RESOLVER4} port 53",
        f"udp {RESOLVER6} port 53",
    }


def test_survives_5000_lines(lab: Lab) -> None:
    plain = plain_start(lab)
    lab.dns.set("*.many.example", {"A": "203.0.113.40"})
    lines = [f"n{number}.many.example" for number in range(2000)]
    lines += [f"192.0.2.{number % 256}:{1000 + number}" for number in range(3000)]
    box = lab.box(policy="\n".join(lines))
    assert box.start(timeout=120) < 15 * plain
    status = box.status()
    assert (status["policy"]["names"], status["policy"]["ranges"]) == (2000, 3000)
    assert attempt(box, ("tcp", "n1999.many.example", 443)).error is None
    assert attempt(box, UNLISTED).error == "ECONNREFUSED"


@pytest.mark.parametrize("meta", [Meta.ERROR, Meta.MALFORMED, Meta.SILENT, Meta.HUGE])
def test_survives_github_without_its_ranges(lab: Lab, meta: Meta) -> None:
    plain = plain_start(lab)
    lab.web.meta(meta)
    box = lab.box(policy="@github\n", env={"INITD_RESOLVE_TIMEOUT": "1"})
    assert box.start() < 1.0 + 4 * plain
    assert "feed.failed" in {event["event"] for event in box.logs().events}
    tried = attempt_all(box, [("tcp", "github.com", 443), ("tcp", "192.0.2.40", 443), UNLISTED])
    assert [one.error for one in tried] == [None, "ECONNREFUSED", "ECONNREFUSED"], "its names work, its ranges do not"


def test_github_ranges_open_when_they_can_be_had(lab: Lab) -> None:
    """Negative control of the four above; and only the warden, and only then, reaches api.github.com/meta."""
    box = lab.box(policy="@github\n")
    box.start()
    assert attempt(box, ("tcp", "192.0.2.40", 443)).error is None
    time.sleep(2.0)
    assert [request.host for request in lab.web.requests(META_HOST)] == [META_HOST], "once"
    assert lab.packets(to=META_ADDRESS)


@pytest.mark.parametrize("family", [Family.V4, Family.SYSCTL, Family.V6], ids=lambda family: family.name)
def test_survives_a_namespace_with_one_family(family: Family) -> None:
    with Lab(family) as lab:
        box = lab.box(policy="site.example\n")
        box.start()
        listed, unlisted = (
            ("2001:db8:2::10", "2001:db8:2::20") if family is Family.V6 else ("203.0.113.10", "203.0.113.20")
        )
        tried = attempt_all(box, [("tcp", "site.example", 443), ("tcp", listed, 443), ("tcp", unlisted, 443)])
        assert [one.error for one in tried] == [None, None, "ECONNREFUSED"]
        other = ("tcp", "203.0.113.20" if family is Family.V6 else "2001:db8:2::20", 443)
        assert attempt(box, other).error is not None


def test_a_missing_policy_file_means_the_defaults(lab: Lab) -> None:
    lab.dns.set("registry.npmjs.org", {"A": "203.0.113.50"})
    box = lab.box(policy=None, env={"INITD_RESOLVE_TIMEOUT": "1"})
    box.start()
    assert box.status()["policy"]["source"] == "built-in defaults"
    tried = attempt_all(box, [("tcp", "registry.npmjs.org", 443), ("tcp", "site.example", 443), UNLISTED])
    assert [one.error for one in tried] == [None, "EAI_NONAME", "ECONNREFUSED"]


def test_an_empty_policy_file_means_nothing(lab: Lab) -> None:
    box = lab.box(policy="# nothing yet\n")
    box.start()
    assert attempt(box, ("tcp", "registry.npmjs.org", 443)).error == "EAI_NONAME"
    assert lab.packets() == []


# Refuses


def unreadable(box: Box) -> None:
    (box.workspace / ".aidevcontainer" / "allowed-domains.txt").chmod(0o600)


def instead(make: Callable[[Path], object]) -> Callable[[Box], None]:
    """Put something else where the policy file is."""

    def put(box: Box) -> None:
        path = box.workspace / ".aidevcontainer" / "allowed-domains.txt"
        path.unlink()
        make(path)

    return put


def without_user(box: Box) -> None:
    path = box.directory / "etc" / "passwd"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("_initd:")))


def unwritable_resolv_conf(box: Box) -> None:
    (box.directory / "etc" / "resolv.conf").chmod(0o444)  # the box's root has no DAC_OVERRIDE


BAD = "github.com\n*\n*.com\nhttps://example.com/x\nsite.example:99999\n0.0.0.0/0\n!@github\n"
NO_ADMIN = [name for name in DEFAULT_CAPABILITIES if name != "NET_ADMIN"]

REFUSALS: dict[str, tuple[dict, Callable[[Box], None] | None]] = {
    "malformed": ({"policy": BAD}, None),
    "unreadable": ({"policy": "site.example\n"}, unreadable),
    "directory": ({}, instead(lambda path: path.mkdir())),
    "fifo": ({}, instead(lambda path: os.mkfifo(path, 0o644))),
    "dangling-link": ({}, instead(lambda path: path.symlink_to("nowhere"))),
    "binary": ({}, lambda box: box.write_policy(bytes(range(256)) * 4)),
    "too-large": ({}, lambda box: box.write_policy(b"a.example\n" * 500_000)),
    "unknown-key": ({"settings": 'verfy = "off"\ncolour = "blue"\n'}, None),
    "bad-toml": ({"settings": "verify = strict\n"}, None),
    "unknown-variable": ({"env": {"INITD_VERFIY": "off", "INITD_BACKEND": "pf"}}, None),
    "required": ({"env": {"INITD_REQUIRE": "ipv4,dns"}}, unwritable_resolv_conf),
    "no-net-admin": ({"capabilities": NO_ADMIN}, None),
    "no-capabilities": ({"capabilities": []}, None),
    "no-user": ({}, without_user),
    "no-resolver": ({"resolv_conf": "# nothing\n"}, None),
    "session-owns-state": ({}, lambda box: os.chown(box.state, box.config.uid, box.config.gid)),
    "warden-group": ({"env": {"CLAUDE_GID": "990"}}, None),
    "root-session": ({"env": {"CLAUDE_UID": "0"}}, None),
    "warden-session": ({"env": {"CLAUDE_UID": "990"}}, None),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_to_start(shared_lab: Lab, name: str) -> None:
    options, prepare = REFUSALS[name]
    box = shared_lab.box(**{"policy": holding.POLICY, **options})
    if prepare is not None:
        prepare(box)
    golden(name, refuses_to_start(box))
    assert not box.ready
    assert shared_lab.packets() == [], "and nothing was asked or sent"


# Somebody who fights over the rules; as one process, because the time to come in between is short.
MEDDLE = {
    "xtables": """
import subprocess
rule = "-p udp -m conntrack --ctstate ESTABLISHED -j ACCEPT".split()
while True:
    subprocess.run(["iptables-legacy", "-w", "-D", "INITD-OUTPUT", *rule], capture_output=True)
""",
    "nftables": """
import time
from initd.errors import InitdError
from initd.kernel import libnftables
while True:
    try:
        rules = libnftables.run("list chain inet initd output").replace("}", "").split()
        if rules[-1] != "accept":
            libnftables.run("add rule inet initd output accept")
    except InitdError:
        pass
    time.sleep(0.001)
""",
}


@pytest.mark.parametrize("backend", ["xtables", "nftables"])
def test_refuses_when_the_kernel_does_not_hold_what_was_written(lab: Lab, backend: str) -> None:
    told = ""
    argv = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", lab.netns, sys.executable, "-c", MEDDLE[backend]]
    with subprocess.Popen(argv, cwd=ROOT) as meddler:
        try:
            for _ in range(20):  # it may come too late, between the read-back and the next look
                box = lab.box(policy=holding.POLICY, env={"INITD_BACKEND": backend})
                box.start(wait=False)
                while box.running and not box.ready:
                    time.sleep(0.01)
                if not box.running:
                    told = what_it_said(box)
                    break
                box.close()
        finally:
            meddler.kill()
    lines = re.sub(r" at \d+: ", " at N: ", told).splitlines(keepends=True)
    golden(f"read-back-{backend}", "".join(dict.fromkeys(lines)))  # it may have come twice


def test_strict_verification_stops_a_box_that_leaks(lab: Lab) -> None:
    """The rules are what was asked for, but packets take another way: a proxy of the network answers for everybody."""
    lab.exec(["ip", "addr", "add", "192.0.2.1/32", "dev", "lo"])
    listen = (
        "import socket, time; s = socket.create_server(('192.0.2.1', 443)); print('on', flush=True); time.sleep(600)"
    )
    argv = ["ip", "netns", "exec", lab.netns, sys.executable, "-c", listen]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as leak:
        try:
            assert leak.stdout is not None
            assert leak.stdout.readline() == b"on\n"
            text = refuses_to_start(lab.box(policy=holding.POLICY))
            warned = lab.box(policy=holding.POLICY, env={"INITD_VERIFY": "warn"})
            warned.start()
        finally:
            leak.kill()
    assert text.startswith("exit 70\ninitd: verification failed:\n  tcp 192.0.2.1 port 443: unlisted address: open in ")
    assert text.endswith(
        "hint: the network is not refusing what it must; INITD_VERIFY=warn starts the box all the same\n"
    )
    assert "verify.failed" in {event["event"] for event in warned.logs().events}


def test_a_start_that_fails_says_so_to_sessions_too(lab: Lab) -> None:
    box = lab.box(policy="*\n", argv=("/bin/sh", "-c", f"{Path(sys.prefix)}/bin/initd; exec sleep 60"))
    box.start(wait=False)
    until = time.monotonic() + 60
    while "the start failed" not in (done := box.fwctl("status")).stderr and time.monotonic() < until:
        time.sleep(0.05)
    assert done.returncode == 69
    assert "the start failed" in done.stderr
    assert "allowed-domains.txt:1:1" in done.stderr


def test_what_is_refused_here_starts_there(lab: Lab) -> None:
    """Negative control of all refusals: the same box without the fault."""
    box = lab.box(policy=holding.POLICY)
    box.start()
    holding.assert_holds(lab, box)
    assert box.exec(client("attempts", "[]")).returncode == 0
    with pytest.raises(BoxError):
        lab.box(policy="*\n").start()
