"""What the recorder keeps and writes: bounded, private, readable again; and what it leaves out."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace

import pytest

from initd import recorder, why
from initd.core import messages
from initd.core.events import COMMAND_LENGTH, Actor, Event, Ring, Session, printable
from initd.core.leases import Lease
from initd.core.policy import Service, Verdict, parse
from initd.dnsfigures import Asked
from initd.kernel.nflog import Packet
from initd.recorder import Recorder


class Log:
    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []

    def info(self, event: str, **fields: object) -> None:
        self.lines.append({"event": event, **fields})


ADDRESS = ip_address("203.0.113.7")
LEASE = Lease("a.example", ADDRESS, 0.0, literal=True)
LEASE.services = frozenset({Service("tcp", 443)})
LEASES = {ADDRESS: (LEASE,)}


@pytest.fixture
def made(tmp_path):
    return Recorder(tmp_path, lambda address: LEASES.get(address, ()), log=Log())


def packet(address: str, port: int = 443, *, prefix: str = "initd", uid: int | None = 501) -> Packet:
    source = "2001:db8::2" if ":" in address else "198.51.100.2"
    return Packet(prefix, uid, "tcp", ip_address(source), 1, ip_address(address), port)


def asked(name: str, verdict: Verdict = Verdict.UNLISTED) -> Asked:
    return Asked(name, "A", verdict, ("127.0.0.1", 1), stream=False)


def rows(made) -> list[tuple[object, ...]]:
    return [(row.event.subject, row.event.reason, row.event.allowed, row.count) for row in made.ring]


def test_why_it_was_refused(made):
    for one in (packet("203.0.113.9"), packet("203.0.113.7", 8443), packet("169.254.169.254", 80)):
        made.packet(one)
    made.packet(packet("203.0.113.9", prefix="initd-audit"))
    made.question(asked("evil.test"))
    made.question(asked("x.bad.test", Verdict.DENIED))
    made.stripped("corp.test", (ip_address("10.9.8.7"), ip_address("fd00::7")))
    assert rows(made) == [
        ("203.0.113.9", "unlisted", False, 1),
        ("a.example", "port", False, 1),
        ("169.254.169.254", "special", False, 1),
        ("203.0.113.9", "unlisted", True, 1),
        ("evil.test", "unlisted", False, 1),
        ("x.bad.test", "denied", False, 1),
        ("corp.test", "special", False, 2),
    ]
    assert made.summary(0)["packets"] == 4


def test_our_own_attempts_are_not_refusals(made):
    made.packet(packet("203.0.113.9", uid=os.getuid()))
    made.packet(replace(packet("ff02::16", uid=None), proto="58", dport=None))  # the kernel's multicast report
    with made.unrecorded({"connect": [["192.0.2.1", 443]], "datagram": [], "ask": [["127.0.0.1", "example.com"]]}):
        made.packet(packet("192.0.2.1"))
        made.question(asked("example.com"))
        made.question(asked("example.org"))
    assert [one[0] for one in rows(made)] == ["example.org"]
    made.question(asked("example.com"))
    assert [one[0] for one in rows(made)] == ["example.org", "example.com"]


def test_the_log_has_each_once_and_a_flood_is_not_written_out(made):
    for _ in range(3):
        made.question(asked("evil.test"))
    assert len(made._log.lines) == 1
    for number in range(500):
        made.question(asked(f"n{number}.test"))
    assert len(made._log.lines) < 100


def test_what_was_written_is_taken_up_again(made, tmp_path):
    for _ in range(2):
        made.question(asked("evil.test"))
        made.write()
    again = Recorder(tmp_path, lambda _: (), log=Log())
    again.ring.restore(recorder.load(tmp_path / recorder.FILE))
    assert rows(again) == [("evil.test", "unlisted", False, 2)]
    assert again.ring.after(0)[0].count == 2
    assert stat.S_IMODE((tmp_path / recorder.FILE).stat().st_mode) == 0o600


def test_lines_that_are_none_are_left_out(made, tmp_path):
    path = tmp_path / recorder.FILE
    path.write_bytes(b'\xff\n{}\n[]\n{"kind": "name"}\n' + b"[" * 100_000 + b"\n")
    assert list(recorder.load(path)) == []
    made.question(asked("evil.test"))
    made.write()
    assert len(list(recorder.load(path))) == 1


def test_the_files_are_bounded_whatever_comes(tmp_path):
    path, ring = tmp_path / recorder.FILE, Ring()
    line = str(ring.add(Event("name", "x" * 200, "A", "unlisted"), 1.0).as_dict()) * 1000 + "\n"
    for _ in range(20):
        recorder.append(path, line)
    sizes = [one.stat().st_size for one in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) < 2 * recorder.FILE_MOST + len(line)


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("")
    (tmp_path / recorder.FILE).symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        recorder.append(tmp_path / recorder.FILE, "line\n")
    assert (tmp_path / "target").read_text() == ""


def test_no_name_of_a_process_makes_the_log_too_long_to_be_told(made):
    grins = printable("\U0001f600" * COMMAND_LENGTH, COMMAND_LENGTH)
    actor = Actor(501, "claude", 7, grins, Session(7, "pts/0", grins))
    for number in range(300):
        name = f"{'a' * 60}.{'b' * 60}.{'c' * 60}.n{number}.test"
        made.ring.add(Event("name", name, "A", "unlisted", actor=actor), 1.0)
    live = SimpleNamespace(
        in_force=SimpleNamespace(lookup=parse("site.example\n").lookup(), loaded=SimpleNamespace(source="list"))
    )
    told = why.rows_after(made, 0)
    assert len(told["rows"]) == why.ROWS
    for answer in (told, why.suggestions(live, made, SimpleNamespace(policy="list"))):
        assert messages.MAX_MESSAGE < len(messages.result(answer)) < messages.MAX_ANSWER
