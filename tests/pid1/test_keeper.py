"""The keeper with a small real warden: what it hands over, when it restarts, what it refuses, how it ends."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from initd.prepare import OWN
from tests.pid1.outer import UID, children, eventually, status

pytestmark = pytest.mark.kernel
NET_CAPS = f"{1 << 12 | 1 << 13:016x}"
DOCUMENTED = "+net_admin,+net_raw,+setuid,+setgid,+setpcap,+kill,+net_bind_service"


def without(*caps):
    return ["setpriv", "--bounding-set", ",".join(f"-{cap}" for cap in caps)]


def warden_pid(box):
    return next(iter(children(box.named("initd-keeper"))), 0)


def test_hands_over_named_descriptors_and_no_other(box):
    warden = box().start().warden()
    fds = dict(pair.split("=") for pair in warden["fds"].split(","))
    assert sorted(fds) == ["control", "dns4-tcp", "dns4-udp", "dns6-tcp", "dns6-udp", "pulse", "resolv"]
    extra = set(warden["open"]) - {0, 1, 2} - {int(fd) for fd in fds.values()}
    assert len(extra) == 2  # the channel, and the listing itself


def test_warden_has_two_capabilities_and_no_new_privs(box):
    lines = dict(line.split(":\t", 1) for line in box().start().warden()["status"].splitlines())
    assert [lines[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == [NET_CAPS] * 5
    assert lines["NoNewPrivs"] == "1"
    assert lines["Groups"].split() == []
    assert lines["SigBlk"] == "0" * 16


def test_keeper_has_only_what_it_hands_on_and_needs(box):
    one = box().start()
    keeper = status(one.named("initd-keeper"))
    wanted = f"{sum(1 << cap for cap in (5, 6, 7, 8, 12, 13)):016x}"
    assert [keeper[f"Cap{kind}"] for kind in ("Prm", "Eff", "Bnd")] == [wanted] * 3
    assert keeper["CapInh"] == keeper["CapAmb"] == "0" * 16
    assert keeper["NoNewPrivs"] == "1"


def test_that_reading_finds_more_where_there_is_more(box):
    """Negative control: a session of root's has what the engine gave."""
    one = box().start()
    session = one.session("sleep", "100", uid=0)
    root = status(eventually(lambda: children(session.pid))[0])
    assert [int(root[f"Cap{kind}"], 16).bit_count() > 6 for kind in ("Prm", "Eff", "Bnd")] == [True] * 3
    assert root["NoNewPrivs"] == "0"


def test_privilege_is_visible_by_name(box):
    one = box().start()
    assert one.comm(one.pid) == "initd", one.stderr
    assert one.named("initd-keeper")
    assert status(one.pid)["Uid"].split() == [str(OWN[0]), str(UID)] * 2


def test_starts_with_the_documented_capabilities_only(box):
    one = box().start(prefix=["setpriv", "--bounding-set", f"-all,{DOCUMENTED}"])
    assert one.is_ready()
    assert one.process.poll() is None
    one.kill()
    assert one.wait() == 0


@pytest.mark.parametrize("cap", ["net_admin", "net_raw", "setuid", "setgid", "setpcap", "kill"])
def test_missing_capability_is_one_line_and_a_hint(box, cap):
    one = box().start(prefix=without(cap), wait=False)
    assert one.wait() == 77
    lines = one.stderr.splitlines()
    assert lines[0] == f"initd: missing capability {cap.upper()}"
    assert lines[1].startswith("hint: cap_add")
    assert len(lines) == 2


def test_port_53_needs_a_capability_or_a_sysctl(box):
    one = box().start(prefix=without("net_bind_service"), wait=False)
    assert one.wait() == 77
    assert "NET_BIND_SERVICE" in one.stderr
    open_ports = "echo 53 > /proc/sys/net/ipv4/ip_unprivileged_port_start"
    assert box().start(prefix=without("net_bind_service"), setup=open_ports).process.poll() is None


def test_port_53_in_use_is_said_so(box):
    server = "import socket as s; u = s.socket(2, 2); u.bind(('127.0.0.1', 53)); open('$OUT/bound', 'w'); input()"
    setup = f'sleep 60 | python3 -c "{server}" & while [ ! -e $OUT/bound ]; do sleep 0.05; done'
    one = box().start(setup=setup, wait=False)
    assert one.wait() == 71
    assert "port 53 of 127.0.0.1 is in use" in one.stderr


def test_no_loopback_is_said_so(box):
    one = box().start(setup="ip address flush dev lo", wait=False)
    assert one.wait() == 71
    assert "ip link set lo up" in one.stderr


@pytest.mark.parametrize("code", [78, 77, 71, 70])
def test_wardens_refusal_is_the_exit_code(box, code):
    one = box(mode=f"refuse {code}").start("true", wait=False)
    assert one.wait() == code
    assert one.stderr.count("initd:") == 1  # whoever failed said it, nobody repeats it


def test_warden_killed_before_armed_is_a_failed_start(box):
    one = box(mode="slow 60").start(wait=False)
    assert eventually(lambda: warden_pid(one))
    one.warden()
    os.kill(warden_pid(one), signal.SIGKILL)
    assert one.wait() == 70
    assert "killed by signal 9" in one.stderr


def test_no_such_warden_user(box):
    one = box(environ={"INITD_WARDEN_USER": "nobody-at-all"}).start(wait=False)
    assert one.wait() == 78
    assert "nobody-at-all" in one.stderr


def test_killed_warden_is_back_and_no_connection_is_lost(box):
    one = box().start()
    assert one.ask(b"generation") == b"1"
    os.kill(warden_pid(one), signal.SIGKILL)
    began = time.monotonic()
    assert one.ask(b"generation") == b"2"  # connected while nobody listened, answered by the next
    assert time.monotonic() - began < 5  # 0.2 s on an idle machine; the keeper notices a silent one after 20 s
    assert one.warden(2)["fds"] == one.warden(1)["fds"]


def test_without_a_keeper_a_killed_warden_is_not_back(box):
    """Negative control: then nobody answers."""
    one = box().start()
    warden = warden_pid(one)
    os.kill(one.named("initd-keeper"), signal.SIGKILL)
    assert eventually(lambda: one.events("keeper.lost"))
    assert one.ask(b"generation") == b"1"
    os.kill(warden, signal.SIGKILL)
    assert eventually(lambda: not Path(f"/proc/{warden}").exists())
    with pytest.raises(OSError, match=r"refused|timed out|reset"):
        one.ask(b"generation", 1.0)


def waiting(one):
    """What is told to whoever asks while there is no warden; "" when there is one."""
    with contextlib.suppress(FileNotFoundError):
        return (one.run_dir / "restarting").read_text()
    return ""


def test_who_waits_for_a_warden_is_told_why_until_there_is_one(box):
    one = box(mode="slow 1").start()  # a good one is back in 0.2 s, which a busy machine may not let us see
    assert one.warden(1)["ended"] == ""
    assert waiting(one) == ""
    os.kill(warden_pid(one), signal.SIGKILL)
    assert eventually(lambda: waiting(one).startswith("the warden has ended 1x"), step=0.001)
    assert one.ask(b"generation") == b"2"
    assert eventually(lambda: waiting(one) == "")
    assert one.warden(2)["ended"].endswith(":137")


def test_crash_loop_backs_off_and_says_so(box):
    one = box(mode="crash").start()
    assert eventually(lambda: len(one.events("warden.ended")) >= 5, seconds=60)
    assert [event["restart_in"] for event in one.events("warden.ended")[:5]] == [0.1, 0.2, 0.4, 0.8, 1.6]
    starts = [one.warden(generation)["time"] for generation in range(1, 6)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert all(gap >= wait for gap, wait in zip(gaps, (0.1, 0.2, 0.4, 0.8), strict=True))
    told = r"the warden has ended \dx; the next is started [\d.]+ s later\n"
    assert eventually(lambda: re.fullmatch(told, waiting(one)))  # said in the log first
    ended = [end.split(":") for end in one.warden(4)["ended"].split(",")]
    assert [code for _, code in ended] == ["3"] * 3
    assert all(starts[0] < float(at) < starts[3] for at, _ in ended)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(one.run_dir / "control.sock"))  # the socket stays while nobody is there
    assert one.process.poll() is None


@pytest.mark.slow
def test_silent_warden_is_replaced(box):
    one = box(mode="hang").start()
    first = one.warden(1)["time"]
    assert eventually((one.run_dir / "warden.2").exists, seconds=60)
    assert 25.5 < one.warden(2)["time"] - first < 40
    assert len(one.events("warden.silent")) == 1


@pytest.mark.slow
def test_a_warden_that_was_frozen_with_the_whole_box_is_not_replaced(box):
    """As `docker pause` does it: the clock goes on, nobody runs, and the keeper may be the first to wake."""
    one = box(environ={"SILENCE": "6"}).start()
    frozen = [one.named("initd-keeper"), warden_pid(one)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(7.0)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.2)
    time.sleep(7.0)
    assert one.events("warden.silent") == []
    assert warden_pid(one) == frozen[1]


def test_a_moment_without_descriptors_ends_no_keeper(box):
    one = box().start()
    keeper, first = one.named("initd-keeper"), warden_pid(one)
    usual = resource.prlimit(keeper, resource.RLIMIT_NOFILE)
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, (3, usual[1]))
    os.kill(first, signal.SIGKILL)
    assert eventually(lambda: len(one.events("warden.ended")) >= 2), one.stderr
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, usual)
    assert eventually(lambda: warden_pid(one) not in {0, first}), one.stderr


def test_stopped_keeper_state_is_published(box):
    one = box(mode="slow 2")
    one.run_dir.mkdir(mode=0o755)
    (one.run_dir / "ready").write_text("stale")
    one.start(wait=False)
    one.warden()
    assert not (one.run_dir / "ready").exists()  # before armed
    assert eventually(lambda: one.events("init.ready"))
    assert (one.run_dir / "ready").read_text() != "stale"
    assert (one.run_dir / "ready").stat().st_mode & 0o777 == 0o644


def test_lost_keeper_takes_nothing_with_it(box):
    one = box().start()
    warden = warden_pid(one)
    os.kill(one.named("initd-keeper"), signal.SIGKILL)
    assert eventually(lambda: one.events("keeper.lost"))
    assert one.ask(b"generation") == b"1"  # the warden goes on
    assert Path(f"/proc/{warden}").exists()
    time.sleep(0.5)
    assert len(one.events("keeper.lost")) == 1
    one.session("sleep", "100")
    assert eventually(lambda: one.named("sleep")), "until it is the session user nobody is left who may tell it"
    one.kill()
    began = time.monotonic()
    assert one.wait() == 0
    assert time.monotonic() - began < 8, "well before the grace of 10 s is over"


def test_warden_is_stopped_last(box):
    one = box().start("sleep", "100")
    script = "trap 'sleep 0.4; touch $OUT/slow; exit' TERM; touch $OUT/there; while :; do sleep 0.05; done"
    one.session("sh", "-c", script)
    assert eventually((one.folder / "there").exists)
    one.kill()
    assert one.wait() == 143
    # Within one tick of the kernel's clock both have the same time; stopped first it would be 0.4 s before.
    assert (one.run_dir / "goodbye").stat().st_mtime_ns >= (one.folder / "slow").stat().st_mtime_ns


def test_term_before_armed_ends_at_once(box):
    one = box(mode="slow 60").start(wait=False)
    one.warden()
    one.kill()
    began = time.monotonic()
    assert one.wait() == 0
    assert time.monotonic() - began < 8  # the warden that is deaf here has 1.5 s; the grace is 10 s


def plan(**fields):
    return json.dumps({"connect": [], "datagram": [], "ask": [], "reach": [], "timeout": 1, **fields}).encode()


def test_probe_runs_as_the_session_user(box):
    one = box().start()
    answer = json.loads(one.ask(plan(connect=[["127.0.0.1", 9]])))
    assert answer["code"] == 0
    assert [item["outcome"] for item in answer["result"]["connect"]] == ["refused"]
    bad = json.loads(one.ask(b'{"no": "plan"}'))
    assert bad["code"] == 64
    assert "error" in bad["result"]


def test_probes_are_bounded_in_number(box):
    one = box().start()
    keeper = one.named("initd-keeper")
    silent = plan(datagram=[["127.0.0.1", 53]], timeout=1)  # nobody answers on the guard's socket
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(one.ask(silent, 20))) for _ in range(8)]
    for thread in threads:
        thread.start()
    most = 0
    uids = set()
    while any(thread.is_alive() for thread in threads):
        probes = [pid for pid in children(keeper) if one.comm(pid) == "initd-probe"]
        most = max(most, len(probes))
        for pid in probes:
            try:
                uids.add(status(pid)["Uid"])
            except (OSError, KeyError):
                continue
        time.sleep(0.02)
    assert len(answers) == 8
    assert all(json.loads(answer)["code"] == 0 for answer in answers)
    assert 1 <= most <= 4
    assert uids == {"\t".join([str(UID)] * 4)}


ORPHANED = """
import os, socket, sys
os.makedirs(os.environ["INITD_RUN_DIR"])
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
if os.fork() == 0:
    os.set_inheritable(theirs.fileno(), True)
    os.environ["INITD_PARENT_FD"] = str(theirs.fileno())
    os.execv(sys.executable, [sys.executable, "-I", sys.argv[2], "keeper", sys.argv[4]])
"""


def test_a_keeper_whose_init_has_died_leaves_strangers_alone(box):
    """Not in a PID namespace of its own: then whoever inherits the keeper is the machine's init."""
    one = box(below=["bash", "-c", 'sleep 1000 & "$0" -c "$ORPHANED" "$@"; wait'], environ={"ORPHANED": ORPHANED})
    one.start(wait=False)
    assert eventually((one.run_dir / "control.sock").exists), one.stderr
    eventually(lambda: not one.named("initd-keeper"))
    assert (bool(one.named("sleep")), one.named("initd-keeper")) == (True, 0), one.stderr
