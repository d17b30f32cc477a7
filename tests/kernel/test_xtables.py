"""What is particular to xtables: its text, its hook, its sets, its races, its caller without root."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from initd.core.ruleset import LEARNED_MOST, Ruleset
from initd.enforce import Enforcer
from initd.errors import KernelError, PrivilegeError
from initd.kernel import libiptc, xtables
from initd.kernel.xtables import Xtables
from tests.kernel.test_contract import LEARNED4, LISTED4, RULESET, armed, element, tries
from tests.kernel.wire import WARDEN, run
from tests.unit.test_chains import ruleset_of

pytestmark = pytest.mark.kernel

CASES = Path(__file__).parents[1] / "cases" / "rules"
NAMES_A_SET = ("-m", "set", "--match-set", "initd4-static", "dst", "-j", "ACCEPT")
CAPABILITIES = "-all,+net_admin,+net_raw"


@pytest.mark.parametrize("path", sorted(CASES.glob("*.xtables")), ids=lambda path: path.stem)
def test_the_kernel_says_what_the_golden_file_says(wire, path):
    wire.do(lambda: armed(Xtables, ruleset_of(path.with_suffix(".toml"))) and None)
    lines = []
    for program in ("iptables-legacy-save", "ip6tables-legacy-save"):
        lines += [f"# {program[: program.index('-')]}", *wire.shell(program).splitlines()]
    assert [line for line in lines if line.startswith(("# ip", "-A "))] == path.read_text().splitlines()


def test_hook_is_put_first_again_and_only_once(wire):
    wire.do(lambda: armed(Xtables) and None)
    wire.shell("iptables-legacy", "-I", "OUTPUT", "1", "-d", "203.0.113.77", "-j", "ACCEPT")
    assert wire.do(tries, [("tcp", "203.0.113.77")])[0].outcome == "open", "negative control"
    for _ in range(3):
        wire.do(lambda: Enforcer(Xtables()).enforce(RULESET))
    assert wire.do(tries, [("tcp", "203.0.113.77")])[0].refused_at_once
    lines = [line for line in wire.shell("iptables-legacy-save").splitlines() if line.startswith("-A OUTPUT")]
    assert lines == ["-A OUTPUT -j INITD-OUTPUT", "-A OUTPUT -d 203.0.113.77/32 -j ACCEPT"]


def test_a_foreign_rule_that_jumps_to_our_chain_is_not_ours_to_remove(wire):
    wire.do(lambda: armed(Xtables) and None)
    wire.shell("iptables-legacy", "-A", "OUTPUT", "-d", "203.0.113.200", "-j", "INITD-OUTPUT")
    wire.do(lambda: Enforcer(Xtables()).enforce(RULESET))
    assert "-A OUTPUT -d 203.0.113.200/32 -j INITD-OUTPUT" in wire.shell("iptables-legacy-save")


def test_a_writer_that_gets_in_between_is_not_overwritten(wire):
    """The kernel answers EAGAIN for a snapshot that is out of date; it is taken anew."""

    def body():
        made = armed(Xtables)
        inner, calls = libiptc.load().Table.append_entry, []

        def racing(self, chain, entry):
            if not calls:
                run("iptables-legacy", "-A", "OUTPUT", "-d", "192.0.2.250", "-j", "ACCEPT")
            calls.append(chain)
            return inner(self, chain, entry)

        libiptc.load().Table.append_entry = racing
        Enforcer(made).enforce(Ruleset(WARDEN))
        return len(calls)

    rules = wire.do(body)
    single = wire.do(lambda: sum(map(len, xtables.rules.chains(4, Ruleset(WARDEN)).values())))
    six = wire.do(lambda: sum(map(len, xtables.rules.chains(6, Ruleset(WARDEN)).values())))
    assert rules == 2 * single + six, "IPv4 was built twice"
    assert "-A OUTPUT -d 192.0.2.250/32 -j ACCEPT" in wire.shell("iptables-legacy-save")


def test_writers_that_never_stop_spoil_no_write(wire):
    """Between our commit and the counters that it carries over, too: then the kernel answers EINVAL."""
    meddle = "while :; do for verb in -I -D; do iptables-legacy $verb FORWARD -s 192.0.2.9 -j DROP; done; done"
    argv = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", wire.box, "sh", "-c", meddle]
    meddlers = [subprocess.Popen(argv, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        wire.do(lambda: [Xtables().lockdown(WARDEN) for _ in range(150)] and None)
    finally:
        for one in meddlers:
            one.kill()
            one.wait()
    assert "-A INITD-OUTPUT" in wire.shell("iptables-legacy-save")


def test_a_rule_the_kernel_refuses_changes_nothing(wire):
    def body():
        made = armed(Xtables)
        before = made.read()
        try:
            libiptc.edit_table(4, lambda table, version: xtables._put(table, version, bad))
        except KernelError as error:
            return str(error), made.read() == before
        return "", False

    bad = {"INITD-OUTPUT": (xtables.rules.Rule("ACCEPT", matches=(("set", (("match-set", ("nowhere", "dst")),)),)),)}
    complaint, same = wire.do(body)
    assert complaint.startswith("ip_tables: ")
    assert same


def test_without_root_but_with_two_capabilities(wire):
    program = (
        "import os;"
        "from initd.kernel.xtables import Xtables;"
        "from initd.enforce import Enforcer;"
        "from tests.kernel.test_contract import RULESET, element;"
        "b = Xtables(); assert b.probe().usable; b.lockdown(990); Enforcer(b).enforce(RULESET);"
        "b.learn([(element('192.0.2.7'), 60)]); assert b.learned(); print(os.getuid(), b.counters().refused['special'])"
    )
    user = ("--reuid", "12345", "--regid", "12345", "--clear-groups", "--no-new-privs")
    sets = (f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}", f"--ambient-caps={CAPABILITIES}")
    command = ("ip", "netns", "exec", wire.box, "setpriv", *user, *sets, sys.executable, "-c", program)
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "12345 0\n", "")
    none = [word.replace(",+net_admin,+net_raw", "") for word in command]
    done = subprocess.run(none, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert "PrivilegeError" in done.stderr, "negative control"
    assert "hint: grant the container NET_ADMIN" in done.stderr


def test_import_spawns_nothing_and_touches_no_other_table(wire):
    program = (
        "import sys; started = [];"
        "spawning = ('subprocess.Popen', 'os.posix_spawn', 'os.fork', 'os.exec', 'os.system');"
        "sys.addaudithook(lambda event, args: started.append(args) if event in spawning else None);"
        "from initd.kernel.xtables import Xtables; b = Xtables(); b.lockdown(990); print(started)"
    )
    assert wire.shell(sys.executable, "-c", program) == "[]\n"
    assert wire.shell("cat", "/proc/net/ip_tables_names") == "filter\n"
    assert wire.shell("cat", "/proc/net/ip6_tables_names") == "filter\n"


def test_many_builds_leave_memory_and_descriptors_alone(wire):
    """python-iptables leaks and overruns where it is used otherwise (recursion, NFLOG's scratch memory, fd 1)."""

    def body():
        made = armed(Xtables)

        def state():
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * 4, len(os.listdir("/proc/self/fd"))

        for _ in range(20):
            made._write(lambda version: xtables.rules.chains(version, RULESET))
        before = state()
        for _ in range(200):
            made._write(lambda version: xtables.rules.chains(version, RULESET))
        return before, state(), made.read() == made.expect(RULESET)

    (kib, descriptors), (later, more), equal = wire.do(body, seconds=60)
    assert equal
    assert more == descriptors
    assert later - kib < 4096


@pytest.mark.parametrize("kind", ["hash:ip", "hash:net", "list:set"])
def test_a_set_of_ours_with_another_type_is_replaced(wire, kind):
    wire.do(lambda: armed(Xtables) and None)
    wire.do(lambda: Xtables().teardown())
    for name in ("initd4-static", "initd4-learned"):
        wire.shell("ipset", "create", name, kind)
        wire.shell("iptables-legacy", "-N", "INITD-OUTPUT", check=False)
    wire.shell("iptables-legacy", "-A", "INITD-OUTPUT", *NAMES_A_SET)
    wire.do(lambda: Enforcer(Xtables()).enforce(RULESET))
    assert wire.do(tries, [("tcp", LISTED4)])[0].outcome == "open"


def test_a_set_that_a_foreign_rule_holds_is_named(wire):
    wire.shell("ipset", "create", "initd4-static", "hash:ip")
    wire.shell("iptables-legacy", "-A", "OUTPUT", *NAMES_A_SET)

    def body():
        try:
            Enforcer(Xtables()).enforce(RULESET)
        except KernelError as error:
            return str(error)
        return ""

    assert "initd4-static is of another type, and a rule that is not ours holds it" in wire.do(body)
    assert wire.do(tries, [("tcp", LISTED4)])[0].refused_at_once, "closed, not open"


def test_a_learned_set_that_is_too_small_grows_and_keeps_what_it_holds(wire):
    wire.shell("ipset", "create", "initd4-learned", "hash:ip,port", "timeout", "300", "maxelem", "16")
    wire.shell("ipset", "add", "initd4-learned", f"{LEARNED4},tcp:443", "timeout", "200")

    def body():
        made = armed(Xtables)
        return made.learned(), tries([("tcp", LEARNED4)])[0].outcome

    learned, outcome = wire.do(body)
    assert 190 <= learned[element(LEARNED4)] <= 200
    assert outcome == "open"
    assert f"maxelem {LEARNED_MOST}" in wire.shell("ipset", "list", "initd4-learned")


def test_a_full_learned_set_and_a_missing_one_are_errors(wire, monkeypatch):
    monkeypatch.setattr(xtables, "LEARNED_MOST", 64)

    def body():
        made = armed(Xtables)
        complaints = []
        for number in range(4):
            batch = [(element(f"192.0.2.{host}", 1000 + number), 60) for host in range(1, 250)]
            try:
                made.learn(batch)
            except KernelError as error:
                complaints.append(str(error))
        held = made.learned()
        made.lockdown(WARDEN)
        run("ipset", "destroy", "initd4-learned")
        try:
            made.learn([(element(LEARNED4), 60)])
        except KernelError as error:
            complaints.append(str(error))
        return complaints, len(held)

    complaints, held = wire.do(body)
    assert complaints[0] == "ipset: adding to initd4-learned: the set is full"
    assert complaints[-1] == "ipset: adding to initd4-learned: the set does not exist"
    assert held >= 64


def test_both_families_are_learned_at_once(wire):
    def body():
        made = armed(Xtables)
        batch = [(element("192.0.2.9", port), 60) for port in (22, 80, 443)]
        made.learn([*batch, (element("2001:db8:2::99"), 60)])
        return len(made.learned())

    assert wire.do(body) == 4


def test_a_lifetime_of_nothing_is_not_for_ever(wire):
    def body():
        made = armed(Xtables)
        made.learn([(element(LEARNED4), 0), (element(LEARNED4, 80), 10**9)])
        first = made.learned()
        time.sleep(1.6)
        return first, made.learned()

    first, later = wire.do(body)
    assert first.get(element(LEARNED4), 0) <= 1  # a busy machine may not have looked before it was over
    assert list(later) == [element(LEARNED4, 80)]


def test_from_a_thread_beside_a_running_event_loop(wire):
    """The warden's shape: apply and read in one executor thread, learn in the loop's own."""

    async def shape():
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as pool:
            made = await loop.run_in_executor(pool, armed, Xtables)
            work = loop.run_in_executor(pool, lambda: [Enforcer(made).enforce(RULESET) for _ in range(5)])
            count = 0
            while not work.done():
                made.learn([(element(LEARNED4, 1 + count % 60000), 60)])
                count += 1
                await asyncio.sleep(0)
            await work
            return count, len(await loop.run_in_executor(pool, made.learned)), threading.active_count()

    count, held, _ = wire.do(lambda: asyncio.run(shape()))
    assert count > 10
    assert held == min(count, 60000), "nothing that was acknowledged got lost in a reload"


def test_a_listing_that_cannot_be_started_is_an_error_of_ours(wire):
    def body():
        made = armed(Xtables)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            made.read()
        except KernelError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        return ""

    assert wire.do(body) == "iptables: the rules cannot be read: Too many open files"


def test_no_ipv6_in_the_kernel(wire, monkeypatch):
    monkeypatch.setattr(xtables, "_has_ipv6", lambda: False)

    def body():
        made = armed(Xtables)
        made.learn([(element("2001:db8:2::99"), 60), (element(LEARNED4), 60)])
        return made.probe(), made.learned(), made.read() == made.expect(RULESET)

    probe, learned, equal = wire.do(body)
    assert probe.usable
    assert not probe.capabilities["ipv6"]
    assert probe.missing == ("ipv6: this kernel has none, so there is nothing to refuse",)
    assert list(learned) == [element(LEARNED4)]
    assert equal
    assert "INITD" not in wire.shell("ip6tables-legacy-save")


def test_ipv6_without_ip6_tables_is_not_silently_half_a_wall(wire, monkeypatch):
    """As on a kernel with IPv6 whose ip6_tables module is absent: libiptc cannot open the table."""

    def body():
        def absent(self):
            raise libiptc.load().IPTCError("can't initialize filter: b'Table does not exist (do you need to insmod?)'")

        libiptc.load().Table6.refresh = absent
        complaints = []
        made = Xtables()
        for step in (lambda: made.lockdown(WARDEN), lambda: made.apply(RULESET)):
            try:
                step()
            except KernelError as error:
                complaints.append(str(error))
        return complaints, made.probe()

    complaints, probe = wire.do(body)
    assert [line.splitlines()[0] for line in complaints] == [
        "ip6_tables: the kernel has no legacy filter table here"
    ] * 2
    assert not probe.usable
    assert probe.missing[0].startswith("ip6_tables: ")


def test_missing_capability_is_the_operator_s_to_grant(wire):
    def body():
        os.setresuid(12345, 12345, 12345)
        complaints = []
        made = Xtables()
        for step in (made.probe, lambda: made.lockdown(WARDEN), lambda: made.apply(RULESET)):
            try:
                step()
            except PrivilegeError as error:
                complaints.append((error.code, error.hint))
        return complaints

    for code, hint in (found := wire.do(body)):
        assert code == 77
        assert "NET_ADMIN" in hint
    assert len(found) == 3
