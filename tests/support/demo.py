"""`make demo`: the product's story, told by what really happens.

Each step does something to a real box in a private internet, checks it on both sides of the cable and returns the line
that is printed. No number is written here: all are measured. The first step that fails ends the demo with exit code 1.
"""

from __future__ import annotations

import ipaddress
import json
import os
import select
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from initd.core.policy import Verdict, parse
from initd.prepare import OWN
from tests.support import lab as labs
from tests.support.attempts import attempt, attempt_all, client
from tests.support.https_server import META, META_HOST
from tests.support.lab import ROOT, Lab
from tests.support.remote import RESOLVER4
from tests.support.zone import Entry

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.attempts import Target
    from tests.support.box import Box, Session

POLICY = ROOT / "examples" / "quickstart" / "allowed-domains.txt"
SITE = "github.com"  # listed by the quickstart's policy
LATE, LATE_FIRST, LATE_SECOND = "added-later.example", "203.0.113.200", "203.0.113.201"
UNLISTED, UNLISTED4, UNLISTED6 = "unlisted.example", "203.0.113.240", "2001:db8:2::240"
METADATA = "169.254.169.254"
ORPHANS = 2000
SLOW_DNS = (0.5, 1.0, 2.0)
"""Seconds that the first answers take, so that there is time to try a box that starts: a busy machine needs more."""

FAST = 250.0  # ms; a refusal that takes longer is a time-out
_MARGIN = " " * len("  0.00 s  ok  ")
_PATIENCE = 30.0  # seconds for anything that has to happen


class StepError(Exception):
    """What was expected did not happen."""


@dataclass(slots=True)
class Story:
    """What the steps share."""

    lab: Lab
    box: Box
    policy: str
    keep: ExitStack
    reachable: set[str] = field(default_factory=set)  # addresses that packets may go to
    download: Session | None = None
    talk: Session | None = None
    slow_dns: float = 0.0  # what the start that was tried had to wait for


def expect(condition: object, otherwise: str) -> None:
    if not condition:
        raise StepError(otherwise)


def wait_for(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + _PATIENCE
    while not condition():
        expect(time.monotonic() < until, f"not within {_PATIENCE:.0f} s: {what}")
        time.sleep(0.005)


# The steps, in the order in which they are told


def internet(story: Story) -> str:
    """Give every name in the policy an address, IPv4 and IPv6."""
    policy = parse(story.policy, file=POLICY.name)
    names = sorted({("www." if rule.wildcard else "") + rule.name for rule in policy.names} - {META_HOST})
    entries = [
        Entry(name, {"A": (f"203.0.113.{100 + number}",), "AAAA": (f"2001:db8:2::{100 + number}",)})
        for number, name in enumerate(names[:90])
    ]
    story.lab.dns.load(entries)
    story.lab.dns.set(LATE, {"A": LATE_FIRST}, ttl=1)
    story.lab.dns.set(UNLISTED, {"A": UNLISTED4, "AAAA": UNLISTED6})
    listed = {value for entry in entries for values in entry.records.values() for value in values}
    story.reachable |= listed | {RESOLVER4, LATE_FIRST, LATE_SECOND}
    return f"a private internet in two network namespaces: {len(names)} sites, DNS, GitHub's /meta; no way out of it"


def lockdown(story: Story) -> str:
    """Try the box while it waits for its first answers."""
    address = next(iter(sorted(story.reachable - {RESOLVER4})))
    for seconds in SLOW_DNS:
        story.slow_dns = seconds
        story.lab.clear()
        story.lab.dns.latency(seconds)
        story.box.start(wait=False)
        wait_for(lambda: story.lab.dns.queries() or not story.box.running, "the first question to the resolver")
        expect(story.box.running, "the box has ended")
        begin = time.monotonic()
        tried = attempt(story.box, ("tcp", address, 443))
        if time.monotonic() - begin < seconds or seconds == SLOW_DNS[-1]:
            break
        story.box.stop()  # it had its answers before it could be tried
    early = story.box.ready
    story.lab.dns.latency(0.0)
    expect(not early, "the box was ready before it could be tried")
    expect(tried.error and tried.ms < FAST, f"{address} answered during the start: {tried}")
    expect(not story.lab.packets(ignore=[RESOLVER4]), "something else than the warden's DNS questions left")
    return (
        "locked down first: while it starts, only the warden's own DNS questions leave; even the address of a listed "
        f"site is refused, in {tried.ms:.1f} ms"
    )


def ready(story: Story) -> str:
    """Wait for the box, then look at PID 1 and at what left on the way."""
    took = story.box.wait_ready()
    status = story.box.status()
    policy, rules = status["policy"], status["rules"]
    expect(policy["source"] != "defaults", "the box did not read the policy file")
    return (
        f"policy read, resolved, enforced, read back from the kernel: {policy['names']} names, "
        f"{policy['wildcards']} wildcards and {policy['feeds']} feed are now {rules['static']} ranges and "
        f"{rules['learned']} addresses with ports ({status['backend']}); ready {took:.2f} s after exec, of which the "
        f"lab's DNS was made to take {story.slow_dns} s"
    )


def verified(story: Story) -> str:
    done = story.box.fwctl("verify", "--json")
    expect(done.returncode == 0, f"fwctl verify: {done.stdout}{done.stderr}")
    checks = json.loads(done.stdout)["checks"]
    bad = [check["name"] for check in checks if not check["ok"]]
    expect(checks and not bad, f"not verified: {bad}")
    return f"verified by behaviour, as the session user, {len(checks)} checks: {', '.join(c['name'] for c in checks)}"


def dropped(story: Story) -> str:
    fields = dict(line.split(":\t", 1) for line in story.box.read("/proc/1/status").splitlines() if ":\t" in line)
    uids, uid, own = fields["Uid"].split(), str(story.box.config.uid), str(OWN[0])
    expect(uids == [own, uid, own, uid], f"PID 1 runs as {uids}")
    held = {name: fields[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb") if int(fields[name], 16)}
    expect(not held, f"PID 1 holds capabilities: {held}")
    return f"PID 1 has dropped to UID {uid}: no capability, no way back; only the warden may touch the rules"


def listed(story: Story) -> str:
    begin = time.monotonic()
    done = story.box.exec(["curl", "-sS", "-m", "5", f"https://{SITE}/"])
    took = (time.monotonic() - begin) * 1000
    expect(done.stdout == f"hello from {SITE}\n", f"https://{SITE}/: {done.stdout}{done.stderr}")
    return f"https://{SITE}/ is listed and answers ({took:.0f} ms, TLS and all)"


def unlisted(story: Story) -> str:
    targets: dict[str, Target] = {
        "by name": ("tcp", UNLISTED, 443),
        "by IPv4 address": ("tcp", UNLISTED4, 443),
        "by IPv6 address": ("tcp", UNLISTED6, 443),
        "over UDP": ("udp", UNLISTED4, 443),
        "cloud metadata": ("tcp", METADATA, 80),
    }
    tried = dict(zip(targets, attempt_all(story.box, list(targets.values())), strict=True))
    for what, outcome in tried.items():
        expect(outcome.error and outcome.ms < FAST, f"{what}: {outcome}")
    expect(not story.lab.dns.queries(UNLISTED), f"{UNLISTED} was asked upstream")
    expect(not story.lab.packets(to=[UNLISTED4, UNLISTED6, METADATA]), "packets to the unlisted left the box")
    outside = ["ip", "netns", "exec", story.lab.internet, "curl", "-sS", "-m", "5", f"http://{UNLISTED4}/"]
    answer = subprocess.run(outside, capture_output=True, text=True, check=False)
    expect(answer.stdout.startswith("hello"), "the unlisted server is down, so its refusal proves nothing")
    times = ", ".join(f"{what} {outcome.ms:.1f} ms" for what, outcome in tried.items())
    return f"an unlisted site (which is up) is refused at once: {times}; 0 packets and 0 DNS questions left the box"


def added(story: Story) -> str:
    """A reload while a download goes on."""
    expect(attempt(story.box, ("tcp", LATE, 443)).error, f"{LATE} answers before it is listed")
    received = story.keep.enter_context((story.box.directory / "download").open("wb"))
    url = f"https://{SITE}/drip?rate=20000"
    story.download = story.box.popen(["curl", "-sSN", url], stdout=received, stdin=subprocess.DEVNULL)
    wait_for(lambda: downloaded(story), "the first bytes of a download")
    report = reload(story, f"{story.policy}\n{LATE}\n")
    expect(report["added_total"] == 1 and not report["removed_total"], f"the reload reports {report}")
    now = attempt(story.box, ("tcp", LATE, 443))
    expect(now.error is None, f"{LATE} is listed now, but: {now}")
    going_on(story)
    return (
        f"{LATE} added, fwctl reload: in force after {report['ms']:.0f} ms, answers in {now.ms:.1f} ms; "
        "a download that was running goes on"
    )


def moved(story: Story) -> str:
    """The address of a listed name changes, as those of a CDN do every minute."""
    expect(attempt(story.box, ("tcp", LATE_SECOND, 443)).error, f"{LATE_SECOND} answers before {LATE} has moved to it")
    story.lab.dns.set(LATE, {"A": LATE_SECOND}, ttl=1)
    begin = time.monotonic()
    wait_for(lambda: attempt(story.box, ("tcp", LATE, 443)).address == LATE_SECOND, "the new address in an answer")
    now = attempt(story.box, ("tcp", LATE, 443))
    expect(now.error is None, f"{LATE} has moved to {LATE_SECOND}, but: {now}")
    took = time.monotonic() - begin
    return f"{LATE} moves to another address: reachable with the first answer to say so ({took:.1f} s; its TTL is 1 s)"


def removed(story: Story) -> str:
    story.talk = story.box.popen(client("talk", LATE, "22"))
    expect(said(story.talk) == "open", f"no connection to {LATE}:22")
    begin = time.monotonic()
    report = reload(story, story.policy)
    expect(report["removed_total"] == 1, f"the reload reports {report}")
    named = [text for text in report["closed"] if f"{LATE_SECOND}:22" in text]
    expect(named, f"the reload does not say that it closed the connection: {report}")
    ending = json.loads(said(story.talk))
    expect(ending["error"], f"the open connection ended without an error: {ending}")
    after = (ending["at"] - begin) * 1000
    expect(attempt(story.box, ("tcp", LATE, 443)).error, f"{LATE} still answers")
    going_on(story)
    return (
        f"{LATE} removed: its open connection is cut {after:.0f} ms after we call fwctl reload, which names it "
        f"({named[0]}); the download still goes on"
    )


def orphans(story: Story) -> str:
    begin = time.monotonic()
    done = story.box.exec(client("orphans", str(ORPHANS)), timeout=60)
    expect(done.returncode == 0, f"the storm failed: {done.stderr}")
    wait_for(lambda: not zombies(story.box), "no zombie left")
    return f"{ORPHANS} orphans in {time.monotonic() - begin:.1f} s: PID 1 has reaped every one, 0 zombies"


def term_inside(story: Story) -> str:
    done = story.box.exec(["sh", "-c", "kill -TERM 1; kill -INT 1; kill -KILL 1"])
    refused = done.stderr.count("not permitted")
    expect(refused == 3, f"not all three were refused: {done.stderr}")
    expect(story.box.running and story.box.ready, "a session could stop the box")
    expect(attempt(story.box, ("tcp", SITE, 443)).error is None, "the box is up but does not work any more")
    return "TERM, INT and KILL from inside the box: the kernel refuses them; only the engine may stop it"


def counted(story: Story) -> str:
    """The far side's own account of the whole demo."""
    github = [ipaddress.ip_network(text) for key in ("web", "api", "git") for text in META[key]]  # type: ignore[attr-defined]
    packets = story.lab.packets()
    strange = {
        packet.dst
        for packet in packets
        if packet.dst not in story.reachable and not any(ipaddress.ip_address(packet.dst) in net for net in github)
    }
    expect(not strange, f"packets to unlisted addresses: {strange}")
    lookup = parse(f"{story.policy}\n{LATE}\n").lookup()
    asked = {query.name for query in story.lab.dns.queries()}
    leaked = {name for name in asked if name != META_HOST and lookup.decide(name).verdict is not Verdict.LISTED}
    expect(not leaked, f"unlisted names were asked upstream: {leaked}")
    return f"counted at the far end: {len(packets)} packets, {len(asked)} names asked; 0 of them unlisted"


def stopped(story: Story) -> str:
    end = story.box.stop()
    expect(end.code in {0, 143}, f"exit code {end.code}")
    return f"TERM from outside, as `docker stop` sends it: all ended after {end.seconds:.2f} s, exit code {end.code}"


STEPS: tuple[Callable[[Story], str], ...] = (
    internet, lockdown, ready, verified, dropped, listed, unlisted,
    added, moved, removed, orphans, term_inside, counted,
)  # fmt: skip


# What the steps are made of


def reload(story: Story, policy: str) -> dict[str, Any]:
    """Write the policy file and put it into force; what `fwctl reload --json` reported."""
    story.box.write_policy(policy)
    done = story.box.fwctl("reload", "--json")
    expect(done.returncode == 0, f"fwctl reload: {done.stdout}{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def said(session: Session) -> str:
    """The next line that a session prints."""
    assert session.stdout is not None
    expect(select.select([session.stdout], [], [], _PATIENCE)[0], f"a session said nothing for {_PATIENCE:.0f} s")
    return session.stdout.readline().decode().strip()


def downloaded(story: Story) -> int:
    return (story.box.directory / "download").stat().st_size


def going_on(story: Story) -> None:
    have = downloaded(story)
    wait_for(lambda: downloaded(story) > have, "more bytes of the download")
    expect(story.download and story.download.poll() is None, "the download has ended")


def zombies(box: Box) -> list[int]:
    found = []
    for pid in box.all_pids():
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    found.append(pid)
        except OSError:
            continue
    return found


def shell(box: Box) -> None:
    """A shell in the box as the session user, on our terminal."""
    print(
        "\nThis is a shell in the box, as its user. Try: fwctl status; curl https://github.com/; exit ends the box.\n"
    )
    environment = box.environment() | {"HOME": "/home/claude", "PS1": r"\u@box:\w\$ "}
    subprocess.run(box.entering(["bash", "--norc"]), env=environment, check=False)


class Printer:
    """One line a step, with the seconds since the start; colour on a terminal only."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def line(self, mark: str, text: str) -> None:
        colour = {"ok": "\x1b[32m", "FAILED": "\x1b[31m"}[mark]
        shown = f"{colour}{mark}\x1b[0m" if self._colour else mark
        lines = textwrap.wrap(text, max(40, min(shutil.get_terminal_size().columns, 110) - len(_MARGIN)))
        print(f"{time.monotonic() - self._begin:6.2f} s  {shown}  " + f"\n{_MARGIN}".join(lines), flush=True)


def tell(story: Story, printer: Printer, step: Callable[[Story], str]) -> bool:
    """Do one step; whether it succeeded."""
    try:
        printer.line("ok", step(story))
    except Exception as failure:  # whatever went wrong, the newcomer gets the box's log with it
        printer.line("FAILED", f"{step.__name__}: {type(failure).__name__}: {failure}")
        print(f"\nThe box's log:\n{story.box.logs().text}", file=sys.stderr)
        return False
    return True


def main() -> int:
    reason = labs.can_run()
    if reason is not None:
        print(f"demo: {reason}\nhint: sudo make demo, on a Linux machine or VM", file=sys.stderr)
        return 77
    print(
        "A box for a coding agent: initd as PID 1, a network that refuses what is not in\n"
        f"examples/quickstart/{POLICY.name}. Everything below happens now, on this\n"
        "machine, in network namespaces of its own; nothing is sent to the real internet.\n"
    )
    try:
        return play()
    except KeyboardInterrupt:
        return 130


def play() -> int:
    """The whole demo; the exit code."""
    printer = Printer()
    policy = POLICY.read_text()
    with Lab() as lab, ExitStack() as keep:
        story = Story(lab, lab.box(policy=policy), policy, keep)
        if not all(tell(story, printer, step) for step in STEPS):
            return 1
        if os.environ.get("INTERACTIVE") not in {None, "", "0"}:
            shell(story.box)
        for session in (story.download, story.talk):
            if session is not None:
                keep.callback(session.wait)
        return 0 if tell(story, printer, stopped) else 1


if __name__ == "__main__":
    sys.exit(main())
