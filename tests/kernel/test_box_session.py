"""A session can do what it likes: it gains nothing, and the policy holds afterwards."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from initd.prepare import OWN
from tests.support import attacks, holding, product
from tests.support.attempts import client
from tests.support.box import RUN
from tests.support.demo import zombies
from tests.support.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.box import Box

pytestmark = pytest.mark.kernel

SOURCE = Path(attacks.__file__).read_text()
NONE = "0000000000000000"

# Sends frames to the control socket, one connection each, and prints what came back.
SEND = """
import json, socket, sys
answers = []
for text in json.load(sys.stdin):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(sys.argv[1])
        try:
            sock.sendall(text.encode("latin-1"))
            sock.shutdown(socket.SHUT_WR)
            answers.append(sock.makefile("rb").read().decode())
        except OSError as error:
            answers.append(f"OSError {error.errno}")
print(json.dumps(answers))
"""

# Holds idle connections to the control socket until standard input ends.
HOLD = """
import socket, sys
held = []
for _ in range(int(sys.argv[2])):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(sys.argv[1])
    held.append(sock)
print("held", flush=True)
sys.stdin.read()
"""

# Source port 53 towards the resolvers and an unlisted address, as the warden's own questions might look.
SPOOF = """
import json, socket
gained = []
for source in ("0.0.0.0", "198.51.100.2", "127.0.0.2"):
    for where in (("203.0.113.53", 53), ("203.0.113.20", 53), ("203.0.113.20", 443)):
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.settimeout(0.3)
            try:
                sock.bind((source, 53))
            except OSError as error:
                gained.append(["bind", source, error.errno])
                continue
            try:
                sock.connect(where)
                sock.send(bytes.fromhex("1d1d01000001000000000000") + b"\\x04site\\x07example\\0\\0\\1\\0\\1")
                gained.append(["answer", *where, sock.recv(512) != b""])
            except OSError:
                pass
print(json.dumps(gained))
"""

# Has verifications run and takes standard error from each probe, before it can protect itself, to write a line there.
FORGE = """
import ctypes, json, os, socket, threading, time
taken, end = set(), time.monotonic() + 40
def ask():
    while not taken:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect("/run/initd/control.sock")
            sock.sendall(b'{"op":"verify"}\\n')
            sock.makefile().readline()
asking = threading.Thread(target=ask, daemon=True)
asking.start()
while not taken and time.monotonic() < end:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                if not file.read().endswith("\\0probe\\0"):
                    continue
            where = os.readlink(f"/proc/{pid}/fd/2")
            fd = ctypes.CDLL(None).syscall(438, os.pidfd_open(int(pid)), 2, 0)  # pidfd_getfd
            os.write(fd, b'{"event": "forged"}\\n')
            taken.add(where)
        except OSError:
            continue
asking.join(20)
print(json.dumps(sorted(taken)))
"""


@dataclass(frozen=True)
class Scene:
    lab: Lab
    box: Box

    def python(self, code: str, *arguments: str, user: str = "session", text: str = "") -> object:
        done = self.box.exec([str(product.PYTHON), "-I", "-c", code, *arguments], user=user, text=text, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def send(self, *frames: str, user: str = "session") -> list[str]:
        answers = self.python(SEND, f"{RUN}/control.sock", text=json.dumps(frames), user=user)
        assert isinstance(answers, list)
        return answers


@pytest.fixture(scope="module", params=["xtables", "nftables"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with Lab() as lab:
        holding.let_ping(lab)
        box = lab.box(policy=holding.POLICY, env={"INITD_BACKEND": request.param})
        box.start()
        yield Scene(lab, box)


@pytest.fixture(autouse=True)
def still_holds(scene: Scene) -> Iterator[None]:
    """After each test: the same rules, the same processes, the same behaviour, and nothing strange outside."""
    rules, processes = holding.rules(scene.lab), scene.box.pids()
    yield
    assert holding.rules(scene.lab) == rules
    assert scene.box.pids() == processes
    holding.assert_holds(scene.lab, scene.box)
    assert holding.strange_packets(scene.lab) == set(), "in the whole run"


def test_a_session_has_no_capability(scene: Scene) -> None:
    for path in ("/proc/self/status", "/proc/1/status"):
        status = scene.box.exec(["cat", path]).stdout
        held = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert {held[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {NONE}, path
        assert held["NoNewPrivs"] == "1"
        real = "501" if path == "/proc/self/status" else str(OWN[0])
        assert held["Uid"].split() == [real, "501", real, "501"]
    root = scene.box.exec(["cat", "/proc/self/status"], user="root").stdout
    assert f"CapEff:\t{NONE}" not in root, "the same question finds them where they are"


def test_a_session_writes_no_line_of_our_log(scene: Scene) -> None:
    assert scene.python(FORGE) == ["/dev/null"], "negative control: a probe's standard error can be taken"
    assert "forged" not in scene.box.logs().text


def test_no_attack_gains_anything(scene: Scene) -> None:
    results = scene.python(SOURCE)
    assert isinstance(results, dict)
    assert len(results) > 100
    assert [name for name, gained in results.items() if gained] == []


def test_root_in_the_box_could_do_it(scene: Scene) -> None:
    """Negative control: the attacks are real ones."""
    results = scene.python(SOURCE, *(name for name in attacks.CONTROLS if name != "trace the warden"), user="root")
    assert isinstance(results, dict)
    assert [name for name, gained in results.items() if not gained] == []


def test_pid_1_cannot_be_stopped_by_its_own_user(scene: Scene) -> None:
    """Only its effective UID is the session's, and kill(2) looks at the others."""
    script = "for name in 0 TERM INT HUP QUIT KILL STOP TSTP XCPU USR1 ABRT; do kill -$name 1 && exit 9; done; exit 3"
    done = scene.box.exec(["bash", "-c", script])
    assert done.returncode == 3, done.stderr
    assert scene.box.exec(client("orphans", "50")).returncode == 0
    assert scene.box.running
    assert scene.box.exec(["sh", "-c", "sleep 60 & kill -TERM $!"]).returncode == 0, "negative control"


def test_garbage_on_the_control_socket(scene: Scene) -> None:
    frames = ["\n", "{}\n", "[]\n", "null\n", '{"op": "teardown"}\n', '{"op": "reload", "file": "/tmp/x"}\n',
              '{"op": "test", "target": 1}\n', "\x00\xff\xfe\n", "[" * 60_000 + "\n", "x" * 200_000 + "\n",
              '{"op": "status"', "GET / HTTP/1.1\r\n\r\n"]  # fmt: skip
    for frame, answer in zip(frames, scene.send(*frames), strict=True):
        assert not answer.startswith('{"ok":true'), frame[:60]
    (good,) = scene.send('{"op":"status"}\n')
    assert good.startswith('{"ok":true'), "negative control: the same way in works for what is a request"


def test_a_session_may_reload_a_policy_that_it_cannot_write(scene: Scene) -> None:
    done = scene.box.fwctl("reload", "--json", user="session")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["added_total"] == 0


def test_a_session_cannot_lock_the_operator_out(scene: Scene) -> None:
    argv = [str(product.PYTHON), "-I", "-c", HOLD, f"{RUN}/control.sock", "64"]
    holder = scene.box.popen(argv)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        begin = time.monotonic()
        done = scene.box.fwctl("status", user="root")
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - begin < 8.0  # idle connections are let go after ten seconds
    finally:
        holder.communicate()


def test_source_port_53_makes_no_warden(scene: Scene) -> None:
    """Engines let everybody bind low ports; the warden is its UID and nothing else."""
    scene.lab.exec(["sysctl", "-qw", "net.ipv4.ip_unprivileged_port_start=0"])
    try:
        results = scene.python(SPOOF)
    finally:
        scene.lab.exec(["sysctl", "-qw", "net.ipv4.ip_unprivileged_port_start=1024"])
    assert isinstance(results, list)
    assert [one for one in results if one[0] == "answer"] == []
    assert len([one for one in results if one[0] == "bind"]) < 9, "at least some could bind"
    before = len(scene.lab.dns.queries("site.example"))
    control = scene.python(SPOOF.replace("(source, 53)", "(source, 0)"), user="root")
    assert isinstance(control, list)
    assert control == [], "not even root passes: it may reach port 53 only where the engine's resolver is used"
    assert len(scene.lab.dns.queries("site.example")) == before


def test_2000_orphans_leave_no_zombie(scene: Scene) -> None:
    done = scene.box.exec(client("orphans", "2000"), timeout=60)
    assert done.returncode == 0, done.stderr
    until = time.monotonic() + 30.0
    while (left := zombies(scene.box)) and time.monotonic() < until:
        time.sleep(0.02)
    assert left == []


def test_a_zombie_would_be_seen(scene: Scene) -> None:
    """Negative control of the count."""
    parent = scene.box.popen(["bash", "-c", "sleep 0.05 & exec sleep 60"])
    try:
        until = time.monotonic() + 30.0
        while not (found := zombies(scene.box)) and time.monotonic() < until:
            time.sleep(0.01)
        assert found
    finally:
        with contextlib.suppress(ProcessLookupError):
            parent.kill()
        parent.communicate()
