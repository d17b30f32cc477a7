"""Who may stop the box: the engine and root, never a session, whatever it writes into its signals."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import time

import pytest

from tests.pid1.behaviours import RECORDER
from tests.pid1.outer import children, eventually, status

pytestmark = pytest.mark.kernel

SEND = """
import ctypes, os, signal, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def forge(pid, uid):     # rt_sigqueueinfo(PID, SIGTERM): SI_QUEUE with a sender of our choice
    info = ctypes.create_string_buffer(struct.pack("=iiiiII", 15, 0, -1, 0, pid, uid), 128)
    return lambda target: libc.syscall(129, target, 15, info)
def own_a_pipe(target):  # fcntl(2): the kernel sends it for us when the pipe becomes readable
    import fcntl
    ours, theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETOWN, target)
    fcntl.fcntl(ours, 10, signal.SIGTERM)
    fcntl.fcntl(ours, fcntl.F_SETFL, fcntl.fcntl(ours, fcntl.F_GETFL) | os.O_ASYNC)
    os.write(theirs, b"x")
    import time; time.sleep(0.2)
ways = {
    "kill": lambda target: os.kill(target, signal.SIGTERM),
    "tgkill": lambda target: libc.syscall(234, target, target, 15),
    "pidfd": lambda target: signal.pidfd_send_signal(os.pidfd_open(target), signal.SIGTERM),
    "nobody sent it": forge(0, 0),
    "root sent it": forge(1, 0),
    "pipe": own_a_pipe,
}
try:
    ways[sys.argv[1]](int(sys.argv[2]))
except PermissionError:
    pass
"""
WAYS = ["kill", "tgkill", "pidfd", "nobody sent it", "root sent it", "pipe"]

FLOOD = """
import os, signal
print(flush=True)
while True:
    try:
        os.kill(1, signal.SIGTERM)
    except PermissionError:
        pass
"""


def test_root_inside_may_stop_it(box):
    one = box().start()
    one.session("sh", "-c", "kill -TERM 1", uid=0)
    assert one.wait() == 0


@pytest.mark.parametrize("way", WAYS)
def test_no_signal_of_a_session_reaches_pid_1(box, way):
    """Its own process, which has the same effective UID, is reached the same way."""
    one = box().start()
    one.session(sys.executable, "-IS", "-c", SEND, way, "1").wait()
    victim = one.session(
        "sh", "-c", f'sleep 100 & "$0" -IS -c "$1" "{way}" $!; wait $!; echo $?', sys.executable, SEND, stdout=-1
    )
    assert victim.stdout.read().strip() == b"143", "negative control"
    victim.wait()
    assert one.process.poll() is None
    assert not one.events("init.stopping")


def test_a_flood_from_inside_does_not_swallow_the_engines_stop(box):
    """One TERM is enough: none of theirs is ever pending, which would swallow it, signal(7)."""
    one = box().start()
    floods = [one.session(sys.executable, "-IS", "-c", FLOOD, stdout=-1) for _ in range(2)]
    for flood in floods:
        flood.stdout.readline()
    time.sleep(0.5)
    began = time.monotonic()
    one.kill()
    assert one.wait() == 0
    assert time.monotonic() - began < 8, "well before the grace of 10 s is over"


def test_forwarding_is_fast(box):
    """Beside signals straight to the command: what a busy machine makes late is late for both."""
    one = box().start(*RECORDER)
    assert eventually((one.folder / "recording").exists)
    (command,) = set(children(one.pid)) - {one.named("initd-keeper")}
    path, took = one.folder / "signals", []
    for count in range(100):
        began = time.perf_counter()
        os.kill((one.pid, command)[count % 2], signal.SIGUSR1)
        while path.stat().st_size < 3 * (count + 1):
            assert time.perf_counter() - began < 5
            time.sleep(0.0001)
        took.append(time.perf_counter() - began)
    forwarded, straight = sorted(took[::2]), sorted(took[1::2])
    assert statistics.median(forwarded) < 2 * statistics.median(straight) + 0.01  # it takes two processes, not one
    assert forwarded[-3] < 2 * straight[-3] + 0.05


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
        assert one.wait() == 143


def test_the_launcher_leaves_no_signal_blocked(box):
    one = box().start("grep", "SigBlk", "/proc/self/status", prefix=BLOCKED, options=["-u"], wait=False)
    assert one.wait() == 0
    assert one.stdout.split()[1] == "0" * 16


def test_a_stderr_that_nobody_reads_is_no_signal_to_the_command(box):
    """The kernel tells PID 1 of its own broken pipe; forwarded, that would end the command."""
    deaf = "exec 2> >(exec true); sleep 0.3"
    one = box().start("sh", "-c", "sleep 1; exit 7", setup=deaf, wait=False)
    assert one.wait() == 7
    one = box().start("tail", "-f", "/dev/null", setup=deaf, wait=False)
    assert eventually(lambda: one.named("tail"))
    one.kill(signal.SIGPIPE)
    assert one.wait() == 128 + signal.SIGPIPE, "the engine's own is passed on"


# A stderr that takes nothing and does not block; the reading end stays open.
CLOGGED = """
import os, sys
reader, writer = os.pipe()
os.set_inheritable(reader, True)
os.set_blocking(writer, False)
try:
    while True:
        os.write(writer, b"x" * 4096)
except BlockingIOError:
    os.dup2(writer, 2)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_exit_codes_need_no_stderr(box):
    clogged = [sys.executable, "-IS", "-c", CLOGGED]
    assert box().start("no-such-command", prefix=clogged, wait=False).wait() == 127
    assert box(environ={"INITD_BACKEND": "none"}).start("true", prefix=clogged, wait=False).wait() == 78
    deaf = "exec 2> >(exec true); sleep 0.3"
    assert box(environ={"INITD_BACKEND": "none"}).start("true", setup=deaf, wait=False).wait() == 78


def test_group_option_signals_the_whole_group(box):
    script = "trap 'touch $OUT/child; exit' USR1; touch $OUT/up; while :; do sleep 0.05; done"
    for options, expected in ((["-g"], True), ([], False)):
        one = box().start(
            "sh", "-c", f"trap : USR1; sh -c '{script.replace(chr(39), chr(34))}' & wait; wait", options=options
        )
        assert eventually((one.folder / "up").exists)
        one.kill(signal.SIGUSR1)
        assert eventually((one.folder / "child").exists, seconds=20 if expected else 1) == expected


def test_parent_death_signal(box):
    """As a child: when the parent dies, initd is told, and everything ends."""
    parent = ["sh", "-c", '"$@" & echo $! > $OUT/pid; wait', "sh"]
    one = box(below=["sh", "-c", '"$@"; sleep 100', "sh", *parent])
    one.start(options=["-p", "TERM"], wait=False)
    assert eventually(lambda: one.events("init.ready"))
    middle = children(one.pid)[0]
    init = children(middle)[0]
    os.kill(middle, signal.SIGKILL)

    def ended():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return status(init)["State"].startswith("Z")
        return True

    assert eventually(ended)
