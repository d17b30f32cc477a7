"""What is asked of an init, each as a function that fails by assertion: one body for every init.

The docstring's first line is the row's text in docs/init.md.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import socket
import sys
import time

from tests.pid1.outer import HERE, children, eventually, status

RECORDER = [sys.executable, "-IS", str(HERE / "recorder.py")]


def exit_codes(make):
    """exit codes 0 to 255 are the command's"""
    for code in (0, 1, 42, 125, 126, 127, 200, 255):
        assert make().start("sh", "-c", f"exit {code}", wait=False).wait() == code


def killed_by_signal(make):
    """a command killed by signal n gives 128 + n (TERM, KILL, SEGV)"""
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV):
        assert make().start("sh", "-c", f"kill -{int(number)} $$", wait=False).wait() == 128 + number


def not_found(make):
    """127 and a message that names the command when it does not exist"""
    box = make().start("no-such-command", wait=False)
    assert box.wait() == 127
    assert "no-such-command" in box.stderr


def not_executable(make):
    """126 and a message that names the command when it may not be executed"""
    box = make()
    (box.folder / "plain").write_text("#!/bin/sh\n")
    (box.folder / "plain").chmod(0o644)
    box.start(str(box.folder / "plain"), wait=False)
    assert box.wait() == 126
    assert "plain" in box.stderr


def no_interpreter_line(make):
    """a script without #! runs through sh, as a shell would run it"""
    box = make()
    (box.folder / "script").write_text("exit 17\n")
    (box.folder / "script").chmod(0o755)
    assert box.start(str(box.folder / "script"), wait=False).wait() == 17


def _recording(make, **options):
    box = make().start(*RECORDER, **options)
    assert eventually((box.folder / "recording").exists), box.stderr
    return box


def _recorded(box):
    return [int(line) for line in (box.folder / "signals").read_text().split()]


def signals_forwarded(make):
    """every signal from outside reaches the command, one to one"""
    box = _recording(make)
    fatal = {signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGCHLD}
    hardware = {
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGABRT,
        signal.SIGSYS,
    }
    wanted = [int(n) for n in signal.valid_signals() if n not in fatal | hardware and n not in (32, 33)]
    for count, number in enumerate(wanted, start=1):  # one by one: a pending TSTP cancels a pending CONT, signal(7)
        box.kill(number)
        assert eventually(lambda count=count: len(_recorded(box)) >= count), signal.strsignal(number)
    assert _recorded(box) == wanted


def realtime_not_coalesced(make):
    """200 real-time signals sent at once arrive as 200"""
    box = _recording(make)
    for _ in range(200):
        box.kill(signal.SIGRTMIN + 3)
    eventually(lambda: len(_recorded(box)) >= 200)
    assert _recorded(box) == [signal.SIGRTMIN + 3] * 200


def stop_signals_do_not_freeze(make):
    """TSTP, TTIN and TTOU leave no frozen box: a TERM afterwards ends it within a second"""
    took = []
    for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
        box = make().start("sleep", "100")
        assert eventually(lambda box=box: box.named("sleep")), box.stderr
        box.kill(number)
        time.sleep(0.1)
        began = time.monotonic()
        box.kill(signal.SIGTERM)
        assert box.wait() == 143
        took.append(time.monotonic() - began)
    assert min(took) < 1, took  # one of three: other processes share these two cores


def session_cannot_stop(make):
    """TERM, INT, HUP, QUIT and USR1 from a non-root process inside change nothing"""
    box = make().start("sleep", "100", as_user=True)
    box.session("sh", "-c", "for s in TERM INT HUP QUIT USR1; do kill -$s 1; done").wait()
    time.sleep(0.3)
    assert box.process.poll() is None


def clean_signal_state(make):
    """the command starts with no signal blocked and none ignored"""
    box = make().start("sh", "-c", "grep -E 'SigBlk|SigIgn' /proc/self/status", wait=False)
    assert box.wait() == 0
    _, blocked, _, ignored = box.stdout.split()
    own = 0b11 << 31  # 32 and 33 are glibc's: its posix_spawn, make's for one, leaves them ignored (spawni.c)
    assert (int(blocked, 16), int(ignored, 16) & ~own) == (0, 0)


def caller_mask(make):
    """the command starts with the caller's signal mask (USR1 blocked)"""
    box = make(preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1}))
    box.start("grep", "SigBlk", "/proc/self/status", wait=False)
    assert box.wait() == 0
    assert int(box.stdout.split()[1], 16) == 1 << (signal.SIGUSR1 - 1)


def terminal(make, *command, controlling=True):
    """A box on a terminal, PID 1 leading its session as an engine arranges it. Returns the box and our side."""
    master, slave = pty.openpty()
    box = make(stdin=slave, stdout=slave, start_new_session=True)
    box.start(*command, prefix=["setsid", "--ctty"] if controlling else [])
    os.close(slave)
    return box, master


def job_control(make):
    """interactive bash on a terminal has job control (`m` in $-)"""
    box, master = terminal(make, "bash", "--norc", "-i")
    os.write(master, b"case $- in *m*) exit 5;; *) exit 6;; esac\n")
    assert box.wait() == 5


def ctrl_c(make):
    """Ctrl-C on the terminal ends the foreground command with 130"""
    box, master = terminal(make, "sleep", "100")
    assert eventually(lambda: box.named("sleep")), box.stderr  # it is in the foreground then
    os.write(master, b"\x03")
    assert box.wait() == 130


def ctrl_z(make):
    """Ctrl-Z on the terminal does not freeze a box without a shell"""
    box, master = terminal(make, "sh", "-c", "sleep 1; exit 9")
    assert eventually(lambda: box.named("sleep")), box.stderr
    os.write(master, b"\x1a")
    assert box.wait() == 9


ORPHANS = """
import os, time, sys
r, w = os.pipe()
for i in range(2000):
    if os.fork() == 0:
        if os.fork() == 0:
            os.close(w); os.read(r, 1); os._exit(0)   # all end at once, when the pipe closes
        os._exit(0)
    os.wait()
print(flush=True)
open(os.environ["OUT"] + "/orphans", "w").close()
while not os.path.exists(os.environ["OUT"] + "/end"):
    time.sleep(0.01)
os.close(w)
time.sleep(30)
"""


def orphan_storm(make):
    """2,000 orphans that end at once leave 0 zombies 100 ms later"""
    for _ in range(4):  # other processes share these two cores: an init that is not run cannot reap
        box = make().start(sys.executable, "-IS", "-c", ORPHANS)
        assert eventually((box.folder / "orphans").exists, seconds=60)
        assert len(children(box.init_pid)) >= 2000
        (box.folder / "end").touch()
        assert eventually(lambda box=box: len(children(box.init_pid)) < 1900, step=0.001)
        # The last one has died: a zombie has no namespace link.
        assert eventually(lambda box=box: len(box.inside()) <= 6)
        if eventually(lambda box=box: box.zombies() == 0, seconds=0.1, step=0.01):
            return
    raise AssertionError("zombies 100 ms later, in each of four storms")


DAEMON = """
import os, signal, sys, time
out, uid = os.environ["OUT"], os.getuid()
def end(*_):
    time.sleep(0.3)
    open(f"{out}/ended.{sys.argv[1]}", "w").close()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
os.setsid() if os.getpid() != os.getsid(0) else None
open(f"{out}/daemon.{sys.argv[1]}", "w").close()
while True:
    signal.pause()
"""


def daemons_get_grace(make):
    """when the command ends, a daemon with a session of its own gets TERM and time to finish"""
    box = make()
    (box.folder / "daemon.py").write_text(DAEMON)
    daemon = (
        f"{sys.executable} -IS {box.folder}/daemon.py one & while [ ! -e $OUT/daemon.one ]; do sleep 0.02; done; exit 4"
    )
    box.start("sh", "-c", daemon, wait=False)
    assert box.wait() == 4
    assert (box.folder / "ended.one").exists(), box.stderr


def sessions_get_grace(make):
    """at the engine's TERM, exec sessions of the user get TERM and time to finish"""
    box = make().start("sleep", "100")
    (box.folder / "daemon.py").write_text(DAEMON)
    session = box.session(sys.executable, "-IS", str(box.folder / "daemon.py"), "user")
    assert eventually((box.folder / "daemon.user").exists)
    box.kill()
    assert box.wait() == 143
    session.wait()
    assert (box.folder / "ended.user").exists(), box.stderr


def root_sessions_get_grace(make):
    """at the engine's TERM, root's exec sessions get TERM and time to finish, though PID 1 is not root"""
    box = make().start("sleep", "100", as_user=True)
    (box.folder / "daemon.py").write_text(DAEMON)
    session = box.session(sys.executable, "-IS", str(box.folder / "daemon.py"), "root", uid=0)
    assert eventually((box.folder / "daemon.root").exists)
    box.kill()
    assert box.wait() == 143
    session.wait()
    assert (box.folder / "ended.root").exists(), box.stderr


def listening_sockets(make):
    """LISTEN_FDS: inherited sockets reach the command, and LISTEN_PID is its PID"""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    held = fcntl.fcntl(server, fcntl.F_DUPFD, 33)
    box = make(pass_fds=(held,))
    setup = f"exec 3<&{held} {held}<&-; export LISTEN_FDS=1 LISTEN_PID=$$"
    box.start("sh", "-c", 'test -S /proc/self/fd/3 && test "$LISTEN_PID" = $$', setup=setup, wait=False)
    os.close(held)
    assert box.wait() == 0


def notify_socket(make):
    """NOTIFY_SOCKET: READY=1 when ready, STOPPING=1 when it stops"""
    box = make()
    path = str(box.folder / "notify")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    server.bind(path)
    server.settimeout(20)
    box.environ["NOTIFY_SOCKET"] = path
    box.start("sleep", "100")
    assert server.recv(100) == b"READY=1"
    box.kill()
    assert server.recv(100) == b"STOPPING=1"


def few_descriptors(make):
    """the init keeps no descriptor that the caller left open"""
    held = os.dup(0)
    box = make(pass_fds=(held,)).start("sleep", "100")
    os.close(held)
    assert eventually(lambda: str(held) not in os.listdir(f"/proc/{box.init_pid}/fd"), seconds=5)


def no_wakeups(make):
    """0 wake-ups in 3 idle seconds"""
    box = make().start("sleep", "100")

    def idle(seconds):
        before = status(box.init_pid)["voluntary_ctxt_switches"]
        time.sleep(seconds)
        return status(box.init_pid)["voluntary_ctxt_switches"] == before

    assert eventually(lambda: idle(0.5)), "the start is not over"
    assert idle(3)


def second_term(make):
    """a second TERM ends the grace of those that ignore the first"""
    deaf = "trap '' TERM; touch $OUT/deaf; while :; do sleep 1; done"
    box = make(environ={"INITD_STOP_GRACE": "30"}).start("sh", "-c", deaf)
    assert eventually((box.folder / "deaf").exists)
    box.kill()
    time.sleep(0.3)
    assert box.process.poll() is None
    box.kill()
    assert box.wait(15) == 137


BEHAVIOURS = [
    exit_codes,
    killed_by_signal,
    not_found,
    not_executable,
    no_interpreter_line,
    signals_forwarded,
    realtime_not_coalesced,
    stop_signals_do_not_freeze,
    session_cannot_stop,
    clean_signal_state,
    caller_mask,
    job_control,
    ctrl_c,
    ctrl_z,
    orphan_storm,
    daemons_get_grace,
    sessions_get_grace,
    root_sessions_get_grace,
    second_term,
    listening_sockets,
    notify_socket,
    few_descriptors,
    no_wakeups,
]
