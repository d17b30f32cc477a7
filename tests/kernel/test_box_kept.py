"""Who keeps whom alive, seen by the operator; who goes first when memory runs out; signals while the warden works."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.pid1.behaviours import RECORDER
from tests.support import memory_cgroup, product
from tests.support.attempts import attempt
from tests.support.box import HOME
from tests.support.memory_cgroup import MemoryCgroup
from tests.support.zone import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.box import Box
    from tests.support.lab import Lab

pytestmark = pytest.mark.kernel

SITE = ("tcp", "site.example", 443)
UNLISTED = ("tcp", "203.0.113.20", 443)
PROMPT = 0.05  # seconds, median, until a signal has reached the command, beyond what it takes in a quiet box

HOG = """
import sys
sys.stdin.readline()
held = []
while True:
    held.append(b"x" * (1 << 20))
"""

FLOOD = """
import socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect(("127.0.0.1", 53))
query = bytes.fromhex("000101000001000000000000") + b"\\x05f0000\\x04many\\x07example\\x00" + bytes.fromhex("00010001")
end = time.monotonic() + float(sys.argv[1])
print("flood", flush=True)
number = 0
while time.monotonic() < end:
    number += 1
    sock.send(number.to_bytes(2) + query[2:] if (number := number % 65536) else query)
"""

ORPHANS = """
import os, sys, time
end = time.monotonic() + float(sys.argv[1])
made = 0
while time.monotonic() < end:
    for _ in range(20):
        child = os.fork()
        if child == 0:
            if os.fork() == 0:
                time.sleep(0.01)
            os._exit(0)
        os.waitpid(child, 0)
        made += 1
    time.sleep(0.05)
print(made)
"""


def eventually(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def health(box: Box) -> tuple[bool, dict[str, dict]]:
    answer = json.loads(box.fwctl("health", "--json").stdout)
    return answer["healthy"], {check["name"]: check for check in answer["checks"]}


def kill_warden(box: Box) -> None:
    """And wait until the next one answers."""
    pid = box.pids()["warden"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: box.pids().get("warden", pid) != pid, "another warden")
    box.status()


# What the operator sees


def test_a_lost_keeper_is_said(box: Callable[..., Box]) -> None:
    one = box(policy="site.example\n")
    assert one.status()["keeper"] is True
    assert health(one)[0]
    os.kill(one.pids()["keeper"], signal.SIGKILL)
    eventually(lambda: not one.status()["keeper"], "the loss in the status")
    assert any("keeper is gone" in text for text in one.status()["warnings"])
    healthy, checks = health(one)
    assert not healthy
    assert [name for name, check in checks.items() if not check["ok"]] == ["keeper"]
    assert "restart the box" in checks["keeper"]["detail"]
    assert attempt(one, SITE).error is None, "rules and guard go on"
    assert attempt(one, UNLISTED).error


def test_a_warden_without_a_keeper_ends_with_its_init(lab: Lab) -> None:
    """Where initd is not PID 1, no kernel ends what it leaves behind."""
    one = lab.box(policy="site.example\n", argv=("/bin/sh", "-c", f"{product.INITD}; exec sleep 60"))
    one.start()
    pids = one.pids()
    os.kill(pids["keeper"], signal.SIGKILL)
    eventually(lambda: not one.status()["keeper"], "the loss in the status")
    init = int(Path(f"/proc/{pids['init']}/task/{pids['init']}/children").read_text())
    warden = os.pidfd_open(pids["warden"])
    assert not select.select([warden], [], [], 1.0)[0], "it goes on while there is a box"
    os.kill(init, signal.SIGTERM)
    assert select.select([warden], [], [], 30.0)[0], "the warden is left behind"
    os.close(warden)
    assert "127.0.0.1" not in one.read("/etc/resolv.conf")


def test_a_crash_loop_is_said(box: Callable[..., Box]) -> None:
    one = box(policy="site.example\n")
    assert one.status()["ended"] == []
    kill_warden(one)
    status = one.status()
    assert [end["code"] for end in status["ended"]] == [137]
    assert status["generation"] == 2
    assert any("ended 1x lately" in text and "137" in text for text in status["warnings"])
    assert health(one)[0], "once is no loop"
    kill_warden(one)
    kill_warden(one)
    healthy, checks = health(one)
    assert not healthy
    assert [name for name, check in checks.items() if not check["ok"]] == ["warden"]
    assert "started 4x" in checks["warden"]["detail"]
    assert attempt(one, SITE).error is None


def test_what_is_asked_while_there_is_no_warden_the_next_one_answers(box: Callable[..., Box]) -> None:
    one = box(policy="site.example\n")
    pid = one.pids()["warden"]
    os.kill(pid, signal.SIGSTOP)
    with one.popen([str(product.FWCTL), "status", "--json"], user="root") as asking:
        time.sleep(0.5)  # the question is in the socket of a warden that will not answer
        os.kill(pid, signal.SIGKILL)
        out, _ = asking.communicate(timeout=60)
    assert asking.returncode == 0
    assert json.loads(out)["generation"] == 2
    eventually(lambda: not Path(f"/proc/{one.pid}/root/run/initd/restarting").exists(), "the word taken back")


# Descriptors


def test_the_warden_takes_all_descriptors_that_it_may(lab: Lab) -> None:
    """Engines give 1,024 and allow more: about what a resolver that does not answer takes under a flood."""
    one = lab.box(policy="site.example\n", argv=("/usr/bin/prlimit", "--nofile=512:2048", str(product.INITD)))
    one.start()
    limits = {role: Path(f"/proc/{pid}/limits").read_text() for role, pid in one.pids().items()}
    files = {role: re.findall(r"open files +(\d+) +(\d+)", text) for role, text in limits.items()}
    few, all_ = [("512", "2048")], [("2048", "2048")]
    assert files == {"init": few, "keeper": few, "warden": all_}


# Memory


def named(box: Box, comm: str) -> list[int]:
    found = []
    for pid in box.all_pids():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if Path(f"/proc/{pid}/comm").read_text() == f"{comm}\n":
                found.append(pid)
    return found


def score(pid: int, name: str) -> int:
    return int(Path(f"/proc/{pid}/{name}").read_text())


def test_pid1_and_keeper_are_the_last_to_be_chosen(box: Callable[..., Box]) -> None:
    """As far as nobody needs CAP_SYS_RESOURCE: the command and its children are made likelier, size does the rest."""
    one = box(policy="site.example\n", command=["sleep", "1000"])
    pids = one.pids()
    eventually(lambda: named(one, "sleep"), "the command")
    (sleep,) = named(one, "sleep")
    base = score(pids["init"], "oom_score_adj")
    assert score(sleep, "oom_score_adj") == min(1000, base + 100)
    assert score(pids["keeper"], "oom_score_adj") == score(pids["warden"], "oom_score_adj") == base
    chosen = sorted(
        [sleep, *(pids[role] for role in ("warden", "keeper", "init"))], key=lambda p: -score(p, "oom_score")
    )
    assert chosen[0] == sleep, "though it is the smallest"

    def ordered() -> bool:
        init, keeper, warden = (rss(pids[role]) for role in ("init", "keeper", "warden"))
        return init < keeper < warden

    # Equal otherwise, so the kernel takes the largest (oom_badness). PID 1 gives memory back when it has begun to idle.
    eventually(ordered, "PID 1 is the smallest, the warden the largest")


@pytest.fixture
def limited() -> Iterator[MemoryCgroup]:
    """96 MiB. Where none can be made, the tests that send SIGKILL, as the kernel does, have to do."""
    reason = memory_cgroup.available()
    if reason is not None:
        pytest.skip(f"NOT TESTED: {reason}")
    with MemoryCgroup(96 << 20) as made:
        yield made


def run_out_of_memory(box: Box, limited: MemoryCgroup) -> None:
    """A session in the limit takes all there is until the kernel kills it."""
    with box.popen([sys.executable, "-IS", "-c", HOG], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as hog:
        assert hog.stdin is not None
        eventually(lambda: children(hog.pid), "the hog")
        limited.take(*children(hog.pid))
        hog.stdin.write(b"\n")
        assert hog.wait(60) in {-9, 137}


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def test_a_session_that_takes_all_memory_goes_alone(box: Callable[..., Box], limited: MemoryCgroup) -> None:
    one = box(policy="site.example\n")
    before = one.pids()
    limited.take(*before.values())
    run_out_of_memory(one, limited)
    assert limited.kills() == 1
    assert one.pids() == before
    assert attempt(one, SITE).error is None


def test_a_warden_chosen_by_the_kernel_is_replaced(box: Callable[..., Box], limited: MemoryCgroup) -> None:
    """The worst case: made the first choice from outside, by who may."""
    one = box(policy="site.example\n")
    before = one.pids()
    limited.take(*before.values())
    Path(f"/proc/{before['warden']}/oom_score_adj").write_text("1000")
    run_out_of_memory(one, limited)
    assert limited.kills() >= 2, "the warden, then the hog"
    after = one.pids()
    assert (after["init"], after["keeper"]) == (before["init"], before["keeper"])
    eventually(lambda: attempt(one, SITE).error is None, "a listed name")
    assert one.pids()["warden"] != before["warden"]
    assert attempt(one, UNLISTED).error
    assert one.status()["ended"][0]["code"] == 137


# Signals while the warden works


def latencies(box: Box, count: int, *, while_: Callable[[], bool]) -> list[float]:
    """Seconds until each of `count` signals from outside has reached the command."""
    path, took = box.home / "signals", []
    have = path.stat().st_size
    for _ in range(count):
        if not while_():
            break
        begin = time.perf_counter()
        box.signal_from_outside(signal.SIGUSR1)
        while path.stat().st_size <= have:
            assert time.perf_counter() - begin < 5
            time.sleep(0.0005)
        took.append(time.perf_counter() - begin)
        have = path.stat().st_size
        time.sleep(0.03)
    return took


@pytest.fixture
def recording(lab: Lab) -> Box:
    lab.dns.load([Entry("*.many.example", {"A": ("203.0.113.30",)})])
    box = lab.box(policy="site.example\n*.many.example\n", command=RECORDER, env={"OUT": HOME})
    box.start()
    eventually((box.home / "recording").exists, "the command")
    (box.home / "signals").touch()
    return box


@pytest.mark.slow
def test_signals_are_prompt_during_a_reload_of_ten_thousand_names(recording: Box) -> None:
    quiet = latencies(recording, 20, while_=lambda: True)
    recording.write_policy("site.example\n" + "".join(f"n{n:05}.many.example\n" for n in range(10_000)))
    argv = [str(product.FWCTL), "reload", "--json"]
    with recording.popen(argv, user="root", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as reload:
        time.sleep(0.2)
        took = latencies(recording, 40, while_=lambda: reload.poll() is None)
        assert reload.wait(120) == 0
    assert len(took) >= 10, "the reload was over too soon to say anything"
    assert statistics.median(took) < statistics.median(quiet) + PROMPT


@pytest.mark.slow
def test_signals_are_prompt_during_a_dns_flood(recording: Box) -> None:
    before = recording.status()["guard"]["queries"]
    quiet = latencies(recording, 20, while_=lambda: True)
    argv = [sys.executable, "-IS", "-c", FLOOD, "3"]
    with recording.popen(argv, stdin=subprocess.DEVNULL) as flood:
        assert flood.stdout is not None
        assert flood.stdout.readline() == b"flood\n"
        took = latencies(recording, 40, while_=lambda: flood.poll() is None)
        flood.wait(60)
    assert len(took) >= 10
    assert statistics.median(took) < statistics.median(quiet) + PROMPT
    assert recording.status()["guard"]["queries"] - before > 1000, "that was no flood"


# Orphans


def rss(pid: int) -> int:
    """KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


@pytest.mark.slow
def test_twenty_seconds_of_orphans_leave_pid1_as_it_was(box: Callable[..., Box]) -> None:
    one = box(policy="site.example\n")
    with one.popen([sys.executable, "-IS", "-c", ORPHANS, "20"], stdin=subprocess.DEVNULL) as storm:
        time.sleep(4)
        early = statistics.median(rss(one.pid) for _ in range(5) if not time.sleep(0.2))
        time.sleep(12)
        late = statistics.median(rss(one.pid) for _ in range(5) if not time.sleep(0.2))
        out, _ = storm.communicate(timeout=60)
    assert int(out) > 1000, "that was no storm"
    assert late - early <= 128
    eventually(lambda: len(one.all_pids()) == 3, "init, keeper and warden alone")
    assert not children_dead(one.pid)


def children_dead(pid: int) -> list[int]:
    return [one for one in children(pid) if Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[0] == "Z"]
