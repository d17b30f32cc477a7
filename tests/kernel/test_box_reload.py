"""A reload swaps what changed and touches nothing else, however often it comes and whatever is in the file."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import initd
from tests.support import holding, product
from tests.support.attempts import attempt, attempt_all, client
from tests.support.box import RUN, WARDEN_UID, Box
from tests.support.lab import Lab
from tests.support.remote import RESOLVER4
from tests.support.zone import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.box import Session

pytestmark = pytest.mark.kernel

# Opens 200 connections a second to a name, resolving it each time, until input ends; prints counts and the errors.
CLIENT = """
import collections, json, select, socket, sys, time
errors, done, due = collections.Counter(), 0, time.monotonic()
print("on", flush=True)
while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
    due = max(due + 0.005, time.monotonic() - 0.5)
    try:
        with socket.create_connection((sys.argv[1], 22), 3) as sock:
            sock.send(b"x")
            if sock.recv(1) != b"x":
                raise OSError("no echo")
        done += 1
    except OSError as error:
        errors[str(error)] += 1
print(json.dumps({"done": done, "errors": errors}))
"""

# Reloads so many times over the control socket, and prints the answers' codes, counted.
RELOADS = """
import collections, json, socket, sys
codes = collections.Counter()
for _ in range(int(sys.argv[2])):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])
        sock.sendall(b'{"op":"reload"}\\n')
        answer = json.loads(sock.makefile("rb").readline())
    codes["ok" if answer["ok"] else answer["error"]["code"]] += 1
print(json.dumps(codes))
"""

# Asks for a reload of a policy that takes a while to parse, and closes its directory as soon as it was read.
CLOSES = """
import ctypes, os, socket, threading
folder = "/workspace/.aidevcontainer"
path, CLOSED = f"{folder}/allowed-domains.txt", 0x10  # IN_CLOSE_NOWRITE, inotify(7)
with open(path, "w") as file:
    file.write("site.example\\nother.example\\n" + "".join(f"!n{n}.example\\n" for n in range(8000)))
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(0)
libc.inotify_add_watch(watch, path.encode(), CLOSED)
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect("/run/initd/control.sock")
    sock.sendall(b'{"op":"reload"}\\n')
    os.read(watch, 4096)
    os.chmod(folder, 0)
    print(sock.makefile().readline())
"""


def python(*arguments: str) -> list[str]:
    return [str(product.PYTHON), "-I", "-c", *arguments]


def reload(box: Box, policy: str | bytes | None = None, *, user: str = "root") -> dict:
    if policy is not None:
        box.write_policy(policy)
    done = box.fwctl("reload", "--json", user=user)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def memory_of(pid: int) -> int:
    """Resident KiB."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))


@contextlib.contextmanager
def talking(box: Box, host: str) -> Iterator[Session]:
    talk = box.popen(client("talk", host, "22"))
    try:
        assert talk.stdout is not None
        assert talk.stdout.readline() == b"open\n"
        yield talk
    finally:
        with contextlib.suppress(ProcessLookupError):
            talk.terminate()
        talk.communicate()


@pytest.fixture(scope="module", params=["xtables", "nftables"])
def shared(request: pytest.FixtureRequest) -> Iterator[tuple[Lab, Box]]:
    with Lab() as lab:
        box = lab.box(policy=holding.POLICY, env={"INITD_BACKEND": request.param})
        box.start()
        yield lab, box


@pytest.fixture
def scene(shared: tuple[Lab, Box]) -> tuple[Lab, Box]:
    """The shared box, with its first policy in force again."""
    reload(shared[1], holding.POLICY)
    shared[0].clear()
    return shared


def test_50_reloads_lose_no_connection(scene: tuple[Lab, Box]) -> None:
    _, box = scene
    load = box.popen(python(CLIENT, "site.example"))
    assert load.stdout is not None
    assert load.stdout.readline() == b"on\n"
    with talking(box, "203.0.113.10") as talk:
        for number in range(50):
            extra = "" if number % 2 else f"other.example\n192.0.2.{number}\n10.0.0.{number}\n"
            report = reload(box, holding.POLICY + extra)
            assert report["added_total"] + report["removed_total"] == 3
            assert report["closed"] == []
        assert talk.poll() is None
    told = json.loads(load.communicate(timeout=60)[0].splitlines()[-1])
    assert told["errors"] == {}
    assert told["done"] > 300


def test_that_client_notices_a_loss(scene: tuple[Lab, Box]) -> None:
    """Negative control: the same client, and the name is gone for one reload."""
    _, box = scene
    load = box.popen(python(CLIENT, "site.example"))
    assert load.stdout is not None
    assert load.stdout.readline() == b"on\n"
    reload(box, "v4.example\n")
    reload(box, holding.POLICY)
    told = json.loads(load.communicate(timeout=60)[0].splitlines()[-1])
    assert told["errors"]


def test_what_is_removed_ends_and_is_named(scene: tuple[Lab, Box]) -> None:
    _, box = scene
    reload(box, f"{holding.POLICY}other.example\n192.0.2.9:22\n")
    with talking(box, "other.example") as one, talking(box, "192.0.2.9") as two, talking(box, "site.example") as kept:
        report = reload(box, holding.POLICY)
        reloaded = time.monotonic()
        for talk in (one, two):
            assert talk.stdout is not None
            ending = json.loads(talk.stdout.readline())
            assert ending["error"]
            assert ending["at"] - reloaded < 1.0
        assert kept.poll() is None
    assert report["closed_total"] == 2
    text = "\n".join(report["closed"])
    assert "other.example" in text
    assert "192.0.2.9:22/tcp" in text
    tried = attempt_all(box, [("tcp", host, 22) for host in ("203.0.113.20", "2001:db8:2::20", "192.0.2.9")])
    assert {one.error for one in tried} == {"ECONNREFUSED"}


def test_a_resolver_that_is_no_longer_listed_is_closed_to_sessions_as_well(scene: tuple[Lab, Box]) -> None:
    """The warden asks there itself, and such a question goes on."""
    _, box = scene
    reload(box, f"{holding.POLICY}{RESOLVER4}:53\n")
    holds = "import socket, sys; s = socket.create_connection((sys.argv[1], 53)); print('open', flush=True); s.recv(1)"
    session, warden = (box.popen(python(holds, RESOLVER4), user=user) for user in ("session", (WARDEN_UID, WARDEN_UID)))
    for one in (session, warden):
        assert one.stdout is not None
        assert one.stdout.readline() == b"open\n"
    report = reload(box, holding.POLICY)
    assert report["closed"] == [f"{RESOLVER4}:53/tcp"]
    assert b"ConnectionAbortedError" in session.communicate(timeout=60)[1]
    assert warden.poll() is None, "negative control"
    warden.terminate()
    warden.communicate()


def test_an_exception_closes_what_it_excepts(scene: tuple[Lab, Box]) -> None:
    lab, box = scene
    lab.dns.load([Entry("a.deep.example", {"A": ("203.0.113.61",)}), Entry("b.deep.example", {"A": ("203.0.113.62",)})])
    reload(box, f"{holding.POLICY}*.deep.example\n")
    with talking(box, "a.deep.example") as denied, talking(box, "b.deep.example") as kept:
        report = reload(box, f"{holding.POLICY}*.deep.example\n!a.deep.example\n")
        assert report["closed_total"] == 1
        assert denied.stdout is not None
        assert json.loads(denied.stdout.readline())["error"]
        assert kept.poll() is None
    assert attempt(box, ("tcp", "203.0.113.61", 443)).error == "ECONNREFUSED"
    assert attempt(box, ("tcp", "203.0.113.62", 443)).error is None


def test_an_address_that_another_name_needs_stays(scene: tuple[Lab, Box]) -> None:
    lab, box = scene
    lab.dns.load(
        [Entry("a.shared.example", {"A": ("203.0.113.63",)}), Entry("b.shared.example", {"A": ("203.0.113.63",)})]
    )
    reload(box, f"{holding.POLICY}a.shared.example\nb.shared.example\n")
    with talking(box, "a.shared.example") as talk:
        assert reload(box, f"{holding.POLICY}b.shared.example\n")["closed"] == []
        time.sleep(0.1)
        assert talk.poll() is None


def test_a_bad_file_changes_nothing(scene: tuple[Lab, Box]) -> None:
    lab, box = scene
    rules = holding.rules(lab)
    with talking(box, "site.example") as talk:
        for bad in ("*\n", b"\xff\xfe\x00", "site.example:99999\nother.example\n"):
            box.write_policy(bad)
            done = box.fwctl("reload")
            assert done.returncode == 78
            assert "allowed-domains.txt:1:" in done.stderr
        assert talk.poll() is None
    assert holding.rules(lab) == rules
    holding.assert_holds(lab, box)


def test_500_bad_reloads_leave_no_trace(scene: tuple[Lab, Box]) -> None:
    lab, box = scene
    box.write_policy("*\nother.example\nhttps://x/\n" * 20)
    control = f"{RUN}/control.sock"
    box.exec(python(RELOADS, control, "50"), user="root")  # what is allocated once
    rules, warden = holding.rules(lab), box.pids()["warden"]
    before = memory_of(warden)
    done = box.exec(python(RELOADS, control, "500"), user="root", timeout=180)
    assert json.loads(done.stdout) == {"78": 500}, done.stderr
    assert box.pids()["warden"] == warden
    assert memory_of(warden) - before < 1024, "KiB"
    assert holding.rules(lab) == rules
    holding.assert_holds(lab, box)


def test_concurrent_reloads_queue(scene: tuple[Lab, Box]) -> None:
    lab, box = scene
    box.write_policy(f"{holding.POLICY}other.example\n")
    many = [box.popen(python(RELOADS, f"{RUN}/control.sock", "5"), user="root") for _ in range(6)]
    for one in many:
        out, err = one.communicate(timeout=90)
        assert json.loads(out) == {"ok": 5}, err
    assert attempt(box, ("tcp", "other.example", 443)).error is None
    assert box.fwctl("health").returncode == 0
    reload(box, holding.POLICY)
    lab.clear()
    holding.assert_holds(lab, box)


def test_a_session_that_may_write_the_policy_may_only_narrow_it(lab: Lab) -> None:
    box = lab.box(policy="site.example\nv4.example\n", policy_writable=True)
    box.start()
    assert any("session can change its own policy" in text for text in box.status()["warnings"])
    wider = box.exec(["sh", "-c", "echo other.example >> /workspace/.aidevcontainer/allowed-domains.txt"])
    assert wider.returncode == 0, wider.stderr
    done = box.fwctl("reload", user="session")
    assert done.returncode == 77
    assert "other.example" in done.stderr
    assert attempt(box, ("tcp", "other.example", 443)).error == "EAI_NONAME"
    assert attempt(box, ("tcp", "203.0.113.20", 443)).error == "ECONNREFUSED"
    report = reload(box, "site.example\n", user="session")
    assert (report["removed_total"], report["added_total"]) == (1, 0)
    assert attempt(box, ("tcp", "203.0.113.11", 443)).error == "ECONNREFUSED"
    box.write_policy("*.example\n")
    assert box.fwctl("reload", user="session").returncode in {77, 78}
    assert reload(box, "site.example\nother.example\n")["added_total"] == 1, "root may"
    assert attempt(box, ("tcp", "other.example", 443)).error is None


def test_settings_that_a_session_may_write_are_told(lab: Lab) -> None:
    """They are believed at the next start: the mode, and where the policy is."""
    nothing = str(Path(initd.__file__).with_name("py.typed"))
    for writable in (False, True):
        box = lab.box(policy_writable=writable, env={"INITD_POLICY": nothing})
        box.start()
        told = [text for text in box.status()["warnings"] if "session can change" in text]
        assert len(told) == writable, "negative control: nothing is told of what it cannot write"
        assert all("its own settings: /workspace/.aidevcontainer is writable for UID 501" in text for text in told)
        box.stop()


def test_a_session_cannot_hide_that_it_may_write_the_policy(lab: Lab) -> None:
    box = lab.box(policy="site.example\n", policy_writable=True)
    box.start()
    done = box.exec(python(CLOSES))
    answer = json.loads(done.stdout)
    assert (answer["ok"], answer.get("error", {}).get("code")) == (False, 77), done.stderr
    assert attempt(box, ("tcp", "other.example", 443)).error == "EAI_NONAME"


def test_a_policy_that_takes_long_to_read_keeps_nobody_waiting(lab: Lab) -> None:
    box = lab.box(policy="site.example\n", policy_writable=True)
    box.start()
    box.write_policy("@githuX\n" * 20_000)
    begin = time.monotonic()
    assert box.status()["generation"] == 1
    quiet, begin = time.monotonic() - begin, time.monotonic()
    many = [box.popen(python(RELOADS, f"{RUN}/control.sock", "1")) for _ in range(6)]
    time.sleep(0.3)
    asked = time.monotonic()
    assert box.status()["generation"] == 1
    waited = time.monotonic() - asked
    assert any(one.poll() is None for one in many), "the control: they are being read"
    for one in many:
        assert json.loads(one.communicate(timeout=90)[0]) == {"78": 1}
    assert waited < quiet + (time.monotonic() - begin) / 2, "not until they were read"


def test_a_session_may_reload_what_only_others_can_write(scene: tuple[Lab, Box]) -> None:
    lab, box = scene
    assert box.exec(["sh", "-c", "echo x >> /workspace/.aidevcontainer/allowed-domains.txt"]).returncode != 0
    assert reload(box, f"{holding.POLICY}other.example\n", user="session")["added_total"] == 1
    assert attempt(box, ("tcp", "other.example", 443)).error is None
    reload(box, holding.POLICY, user="session")
    lab.clear()
    holding.assert_holds(lab, box)


def test_a_removed_file_narrows_to_nothing_more_than_the_defaults(scene: tuple[Lab, Box]) -> None:
    """No file means the defaults, at a reload as at a start; but a session could wait for an editor that saves it."""
    _, box = scene
    (box.workspace / ".aidevcontainer" / "allowed-domains.txt").unlink()
    done = box.fwctl("reload", user="session")
    assert (done.returncode, "only root" in done.stderr) == (77, True)
    assert attempt(box, ("tcp", "site.example", 443)).error is None
    told = reload(box)
    assert told["added_total"], "negative control: root may"
    assert any(one.endswith("the built-in defaults are in force") for one in told["warnings"])
    assert reload(box, user="session")["added_total"] == 0
    assert box.status()["policy"]["source"] == told["policy"]["source"] == "built-in defaults"
    assert attempt(box, ("tcp", "203.0.113.10", 443)).error == "ECONNREFUSED"
