"""Who is behind a socket: only what must be so. With real sockets and real processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from ipaddress import ip_address

import pytest

from initd.core.events import Actor
from initd.owner import Owners, _terminal, processes_of
from tests.support.guarded import paired

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")

HOLD = """
import os, socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if sys.argv[1] == "udp" else socket.SOCK_STREAM)
sock.connect(("127.0.0.1", int(sys.argv[2])))
print(sock.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start():
    """A process of another user, in a session of its own, that holds a socket; and its local port."""
    running = []

    def one(uid: int, proto: str, port: int):
        argv = [sys.executable, "-I", "-c", HOLD, proto, str(port)]
        process = subprocess.Popen(
            ["/usr/bin/python3", *argv[1:]], user=uid, start_new_session=True, cwd="/",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield one
    for process in running:
        process.communicate("")


@pytest.fixture
def server():
    tcp, udp = paired()
    with tcp, udp:
        yield tcp.getsockname()[1]


def of(proto: str, port: int, server: int, **known) -> Actor:
    here = ip_address("127.0.0.1")
    return Owners().of(proto, (here, port), (here, server), **known)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_the_only_process_of_a_user_is_named_with_its_session(start, server, proto):
    process, port = start(64901, proto, server)
    actor = of(proto, port, server)
    assert (actor.uid, actor.user, actor.pid) == (64901, None, process.pid)
    assert actor.command is not None
    assert actor.command.startswith("/usr/bin/python3 -I -c \\nimport os, socket, sys")
    assert actor.session is not None
    assert (actor.session.leader, actor.session.tty) == (process.pid, None)


def test_two_sessions_of_one_user_are_not_told_apart(start, server):
    _, port = start(64902, "tcp", server)
    start(64902, "tcp", server)
    assert of("tcp", port, server) == Actor(64902)


def test_a_socket_that_is_gone_names_nobody_but_the_known_user(start, server):
    process, port = start(64903, "udp", server)
    assert of("udp", port, server, uid=64903).pid == process.pid  # the negative control
    process.communicate("")
    assert of("udp", port, server, uid=64903) == Actor(64903)
    assert of("udp", port, server) == Actor()


def test_a_port_that_is_somebody_elses_by_now_is_not_his(start, server):
    _, port = start(64904, "tcp", server)
    assert of("tcp", port, server, uid=64999) == Actor(64999)


def test_a_flood_of_questions_costs_a_bounded_number_of_looks(start, server):
    _, port = start(64905, "tcp", server)
    owners, here = Owners(), ip_address("127.0.0.1")
    found = [owners.of("tcp", (here, port), (here, server)) for _ in range(200)]
    assert found[0].pid is not None
    assert sum(actor.pid is not None for actor in found) < 60
    assert {actor.uid for actor in found} == {64905}


def test_a_crowd_costs_a_bounded_number_of_looks(start, server, monkeypatch):
    process, port = start(64906, "tcp", server)
    crowd = subprocess.Popen(["sh", "-c", "for n in 1 2 3 4; do sleep 60 & done; wait"], user=64906, process_group=0)
    try:
        while len(processes_of(64906)) < 6:
            time.sleep(0.01)
        monkeypatch.setattr("initd.owner.PROCESSES", 3)
        assert len(processes_of(64906)) == 4
        assert of("tcp", port, server) == Actor(64906)
    finally:
        os.killpg(crowd.pid, signal.SIGKILL)
        crowd.wait()
    monkeypatch.undo()
    while len(processes_of(64906)) > 1:  # killed is not ended
        time.sleep(0.01)
    assert of("tcp", port, server).pid == process.pid, "the control"


def test_processes_of_a_user_leave_us_out():
    assert os.getpid() not in {one.pid for one in processes_of(0)}


def test_terminals():
    assert (_terminal(0), _terminal(34816), _terminal(34817), _terminal(1025)) == (None, "pts/0", "pts/1", "tty 4:1")


def test_without_a_descriptor_to_be_had_nobody_is_named(start, server):
    """The guard asks before it answers: an error here would be an answer that says that it has failed."""
    _, port = start(64904, "tcp", server)
    here, owners, limits = ip_address("127.0.0.1"), Owners(), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        actor = owners.of("tcp", (here, port), (here, server), uid=7)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert actor.uid == 7
    assert actor.pid is None
    assert owners.of("tcp", (here, port), (here, server)).uid == 64904, "negative control: it was there to be found"
