"""What a session can do to PID 1 and to the box's network: nothing, in its own user namespace neither."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.pid1.outer import eventually, status

pytestmark = pytest.mark.kernel

RULE = """
nft add table inet held
nft add chain inet held out '{ type filter hook output priority 0; }'
nft add rule inet held out ip daddr 203.0.113.0/24 counter reject
"""
SEND = "import socket; s = socket.socket(2, 2); s.sendto(b'x', ('203.0.113.7', 9))"


def run(box, script, **options):
    session = box.session("sh", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    return session.wait(60), session.stdout.read().decode()


@pytest.fixture
def started(box):
    route = "ip link add away type veth peer name home; ip link set home up; ip link set away up; "
    route += "ip address add 192.0.2.1/24 dev away; ip route add default via 192.0.2.254"
    return box().start("sleep", "100", setup=f"{route}; {RULE}")


ATTEMPTS = {
    "kill the keeper": "kill -9 $(pgrep -x initd-keeper)",
    "write to the run dir": "touch $INITD_RUN_DIR/ready",
    "remove the control socket": "rm -f $INITD_RUN_DIR/control.sock",
    "PID 1's memory": "head -c1 /proc/1/mem",
    "PID 1's environment": "cat /proc/1/environ",
    "PID 1's descriptors": "ls /proc/1/fd/",
    "PID 1's limits": "prlimit --pid 1 --nofile=10:10",
    "PID 1's life": "kill -TERM 1",
    "PID 1's root": "ls /proc/1/root/",
    "raw socket": "python3 -c 'import socket; socket.socket(2, 3, 1)'",
    "packet socket": "python3 -c 'import socket; socket.socket(17, 3)'",
    "rules": "nft flush ruleset",
    "address": "ip address add 192.0.2.77/24 dev lo",
    "resolv.conf": "echo nameserver 192.0.2.53 > /etc/resolv.conf",
}


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
def test_an_attempt_fails(started, attempt):
    code, said = run(started, attempt)
    assert code != 0, said
    assert started.process.poll() is None, started.stderr
    assert started.ask(b"generation") == b"1"


@pytest.mark.parametrize("attempt", [ATTEMPTS["rules"], ATTEMPTS["raw socket"], ATTEMPTS["write to the run dir"]])
def test_the_same_works_for_root(started, attempt):
    """Negative control: what fails above fails because of who asks."""
    assert run(started, attempt, uid=0)[0] == 0


def test_a_user_namespace_gains_nothing(started):
    """Root of its own namespaces may do what it likes there; the box's rules and traffic stay as they are."""
    code, said = run(started, "unshare -Urn sh -c 'nft add table inet own && nft list tables && id -u'")
    assert (code, "inet own" in said, said.split()[-1]) == (0, True, "0")  # it is root there
    assert run(started, "unshare -Ur nft flush ruleset")[0] != 0  # of the box's network namespace: no
    assert run(started, "unshare -Ur nsenter -t 1 -n true")[0] != 0  # and no way back into it as root
    _, before = run(started, "nft list table inet held", uid=0)
    assert "reject" in before
    assert run(started, f'unshare -Ur python3 -c "{SEND}"')[0] != 0  # still judged by the box's rules
    assert run(started, "unshare -Ur kill -TERM 1")[0] != 0
    assert run(started, "unshare -Ur sh -c 'kill -9 $(pgrep -x initd-keeper)'")[0] != 0
    assert started.process.poll() is None
    assert run(started, "nft delete table inet held", uid=0)[0] == 0
    assert run(started, f'unshare -Ur python3 -c "{SEND}"')[0] == 0, "negative control: it was the rule"


def test_memory_and_descriptors_of_pid_1_are_few(started):
    # What only the start needed is given back after the word that it is over.
    assert eventually(lambda: int(status(started.pid)["VmRSS"].split()[0]) < 12_000), status(started.pid)["VmRSS"]
    # 0, 1, 2, its signals, its keeper; and its own map while it reads there what to give back.
    assert eventually(lambda: len(os.listdir(f"/proc/{started.pid}/fd")) == 5)
