"""Who may stop the box: the engine and root, never a session, whatever it writes into its signals."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time

import pytest

from tests.pid1.behaviours import RECORDER
from tests.pid1.outer import children, eventually, status

pytestmark = pytest.mark.kernel

FORGE = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
pid, uid = int(sys.argv[1]), int(sys.argv[2])
info = ctypes.create_string_buffer(struct.pack("=iiiiII", 15, 0, -1, 0, pid, uid), 128)
sys.exit(libc.syscall(129, 1, 15, info) != 0)   # rt_sigqueueinfo(1, SIGTERM): SI_QUEUE with a sender of our choice
"""

FILL = """
import ctypes, os, resource, signal, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
limit = resource.getrlimit(resource.RLIMIT_SIGPENDING)[0]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
def queue(pid, number):
    info = ctypes.create_string_buffer(struct.pack("=iiiiII", number, 0, -1, 0, os.getpid(), os.getuid()), 128)
    return libc.syscall(129, pid, number, info)
full = 0
while queue(os.getpid(), signal.SIGRTMIN) == 0:
    full += 1
assert queue(1, signal.SIGTERM) == 0             # the kernel has no room for the sender, and says nobody sent it
print(full, flush=True)
import time; time.sleep(1)
"""

FLOOD = """
import os, signal
print(flush=True)
while True:
    os.kill(1, signal.SIGTERM)
"""


def test_root_inside_may_stop_it(box):
    one = box().start()
    one.session("sh", "-c", "kill -TERM 1", uid=0)
    assert one.wait() == 0


@pytest.mark.parametrize("sender", [(0, 0), (1, 0), (7, 0)])
def test_a_forged_sender_counts_for_nothing(box, sender):
    one = box().start()
    forger = one.session(sys.executable, "-IS", "-c", FORGE, *map(str, sender))
    assert forger.wait() == 0  # the kernel took it
    assert eventually(lambda: one.events("signal.ignored"))
    time.sleep(0.2)
    assert one.process.poll() is None


def test_a_full_signal_queue_forges_nothing(box):
    one = box().start(prefix=["prlimit", "--sigpending=2000"])
    limit = "prlimit --sigpending=2000 "
    filler = one.session("sh", "-c", f'exec {limit} "$0" "$@"', sys.executable, "-IS", "-c", FILL, stdout=-1)
    assert int(filler.stdout.readline()) > 100
    assert eventually(lambda: one.events("signal.ignored"))
    assert one.events("signal.ignored")[0]["pid"] == 0  # it did read like the engine's
    assert one.process.poll() is None
    filler.wait()
    one.kill()
    assert one.wait() == 0


def test_a_flood_from_inside_does_not_swallow_the_engines_stop(box):
    one = box().start()
    floods = [one.session(sys.executable, "-IS", "-c", FLOOD, stdout=-1) for _ in range(2)]
    for flood in floods:
        flood.stdout.readline()
    time.sleep(0.5)
    began = time.monotonic()
    for _ in range(4):  # one that meets a pending TERM of theirs is lost, signal(7); hardly ever two in a row
        one.kill()
        if eventually(lambda: one.events("init.stopping"), seconds=0.5):
            break
    assert one.events("init.stopping")
    for flood in floods:
        flood.send_signal(signal.SIGCONT)  # nsenter stops with its child and would not reap it
    assert one.wait(10) == 0
    assert time.monotonic() - began < 3
    assert 1 <= len(one.events("signal.ignored")) + len(one.events("signals.ignored")) <= 6  # once a second


def test_forwarding_is_fast(box):
    one = box().start(*RECORDER)
    assert eventually((one.folder / "recording").exists)
    path, took = one.folder / "signals", []
    for count in range(50):
        began = time.perf_counter()
        one.kill(signal.SIGUSR1)
        while path.stat().st_size < 3 * (count + 1):
            assert time.perf_counter() - began < 1
        took.append(time.perf_counter() - began)
    assert statistics.median(took) < 0.01
    assert sorted(took)[-3] < 0.05  # two cores are shared with other tests


BLOCKED = ["env", "--block-signal"]


@pytest.mark.parametrize("delay", [0, 5, 20, 50, 100, 200])
def test_an_early_term_is_honoured(box, delay):
    """From the launcher's first instruction on; it blocks all signals, so PID 1 finds what came before Python ran."""
    for _ in range(int(os.environ.get("STARTS", "4"))):
        one = box().start("sleep", "100", prefix=BLOCKED, options=["-u"], wait=False)
        assert eventually(lambda one=one: one.comm(one.pid) not in ("bash", "unshare", ""), step=0.0005)
        assert eventually(lambda one=one: int(status(one.pid)["SigBlk"], 16) >> 14 & 1, step=0.0005)
        time.sleep(delay / 1000)
        one.kill()
        assert one.wait(5) == 143


def test_the_launcher_leaves_no_signal_blocked(box):
    one = box().start("grep", "SigBlk", "/proc/self/status", prefix=BLOCKED, options=["-u"], wait=False)
    assert one.wait() == 0
    assert one.stdout.split()[1] == "0" * 16


def test_group_option_signals_the_whole_group(box):
    script = "trap 'touch $OUT/child; exit' USR1; touch $OUT/up; while :; do sleep 0.05; done"
    for options, expected in ((["-g"], True), ([], False)):
        one = box().start(
            "sh", "-c", f"trap : USR1; sh -c '{script.replace(chr(39), chr(34))}' & wait; wait", options=options
        )
        assert eventually((one.folder / "up").exists)
        one.kill(signal.SIGUSR1)
        assert eventually((one.folder / "child").exists, seconds=1) == expected


def test_parent_death_signal(box):
    """As a child: when the parent dies, initd is told, and everything ends."""
    parent = ["sh", "-c", '"$@" & echo $! > $OUT/pid; wait', "sh"]
    one = box(below=["sh", "-c", '"$@"; sleep 100', "sh", *parent])
    one.start(options=["-p", "TERM"], wait=False)
    assert eventually(lambda: one.events("init.ready"), seconds=10)
    middle = children(one.pid)[0]
    init = children(middle)[0]
    os.kill(middle, signal.SIGKILL)
    assert eventually(lambda: not os.path.exists(f"/proc/{init}") or status(init)["State"].startswith("Z"), seconds=5)
