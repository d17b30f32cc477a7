"""Waits and the process walk, against real children."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import time

import pytest

from initd import reap


def status_of(action):
    pid = os.fork()
    if pid == 0:
        action()
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("code", range(256))
def test_every_exit_code_passes(code):
    assert reap.exit_code(status_of(lambda: os._exit(code))) == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGRTMIN])
def test_a_signal_is_128_and_its_number(number):
    def die():
        faulthandler.disable()  # pytest turned it on
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        time.sleep(5)

    assert reap.exit_code(status_of(die)) == 128 + number


@pytest.fixture
def family():
    """A shell with two children, one of them a zombie."""
    script = "sleep 30 & sh -c 'exit 0' & exec sleep 30"
    shell = subprocess.Popen(["sh", "-c", script])
    deadline = time.monotonic() + 30
    while len(_states(shell.pid)) < 2 or "Z" not in _states(shell.pid).values():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield shell.pid
    for pid in [*_states(shell.pid), shell.pid]:
        os.kill(pid, signal.SIGKILL)
    shell.wait()


def _states(parent):
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        pids = [int(pid) for pid in file.read().split()]
    states = {}
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            states[pid] = file.read().rsplit(")", 1)[1].split()[0]
    return states


def test_living_is_the_descendants_without_zombies(family):
    alive = [pid for pid, state in _states(family).items() if state != "Z"]
    assert [process.pid for process in reap.living(family, spare=set())] == alive
    assert {family, *alive} <= {process.pid for process in reap.living(os.getpid(), spare=set())}


def test_spared_processes_take_their_children_with_them(family):
    pids = {process.pid for process in reap.living(os.getpid(), spare={family})}
    assert family not in pids
    assert not pids & set(_states(family))


def test_wait_for_end_returns_when_the_last_one_is_gone():
    began = time.monotonic()
    children = [subprocess.Popen(["sleep", delay]) for delay in ("0.1", "0.3")]
    assert reap.wait_for_end([child.pid for child in children], [], 30)
    assert 0.25 < time.monotonic() - began < 20
    for child in children:
        child.wait()


def test_wait_for_end_gives_up_in_time_and_listens():
    child = subprocess.Popen(["sleep", "30"])
    began = time.monotonic()
    assert not reap.wait_for_end([child.pid], [], 0.2)
    assert 0.15 < time.monotonic() - began < 20
    ours, theirs = os.pipe()
    os.write(theirs, b"x")
    assert not reap.wait_for_end([child.pid], [ours], 30)
    child.kill()
    child.wait()
    os.close(ours)
    os.close(theirs)
