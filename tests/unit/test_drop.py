"""The drop, done for real in forked children of root, and attacked; each attack also against a drop that leaks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from initd import drop
from initd.errors import EnforcementError, PrivilegeError

pytestmark = pytest.mark.kernel
UID = 501


def in_child(action):
    """What `action()` returns, as JSON, from a forked child whose privilege is its own to lose."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = action()
        except Exception as error:
            answer = [type(error).__name__, str(error)]
        os.write(theirs, json.dumps(answer).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as file:
        answer = json.loads(file.read())
    os.waitpid(pid, 0)
    return answer


def state():
    with open("/proc/thread-self/status") as file:
        lines = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    keys = ("Uid", "Gid", "Groups", "NoNewPrivs", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    return {key: lines[key].split() for key in keys}


def test_drop_to_ends_with_nothing():
    def action():
        drop.drop_to(UID, UID)
        return state()

    got = in_child(action)
    assert got["Uid"] == got["Gid"] == [str(UID)] * 4
    assert got["Groups"] == []
    assert got["NoNewPrivs"] == ["1"]
    assert {key: got[key] for key in got if key.startswith("Cap")} == {
        f"Cap{kind}": ["0" * 16] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")
    }


def test_with_a_uid_of_its_own_it_is_out_of_reach_of_its_user():
    def action():
        drop.drop_to(UID, UID, own=65533)
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.setresuid(UID, UID, UID)  # what a command of PID 1's does
            os.write(theirs, b"x")
            signal.pause()
        os.read(ours, 1)
        os.kill(child, signal.SIGTERM)
        return [state()["Uid"], os.WTERMSIG(os.waitpid(child, 0)[1])]

    assert in_child(action) == [["65533", "501", "65533", "501"], signal.SIGTERM]


def test_a_user_namespace_without_that_uid_is_said():
    script = "from initd import drop; drop.drop_to(501, 501, own=65533)"
    shell = ["unshare", "-U", "sh", "-c", 'echo; read mapped; exec "$0" -c "$1"', sys.executable, script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(shell, text=True, **pipes) as process:
        process.stdout.readline()  # it is in its user namespace
        for kind in ("uid", "gid"):
            Path(f"/proc/{process.pid}/{kind}_map").write_text("0 0 1000")
        _, said = process.communicate("mapped\n")
    assert "cannot become UID 501 with the real UID 65533: Invalid argument" in said


def test_attack_finds_nothing_after_the_whole_drop():
    def action():
        drop.drop_to(UID, UID)
        drop.attack(os.getppid())
        return "held"

    assert in_child(action) == "held"


def leak_saved_uid():
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, 0)


def leak_capability():
    drop.prctl(drop.PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
    drop.capset({drop.CAP_NET_RAW}, effective={drop.CAP_NET_RAW}, inheritable=())


def leak_bounding_set():
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)


def leak_group():
    drop.capset({drop.CAP_SETGID}, effective={drop.CAP_SETGID}, inheritable=())


@pytest.mark.parametrize(
    ("leak", "names"),
    [
        (leak_saved_uid, "setreuid 0"),
        (leak_capability, "raw socket"),
        (leak_bounding_set, "bounding 12"),
        (leak_group, "setgroups"),
    ],
)
def test_attack_names_what_a_leaking_drop_left(leak, names):
    def action():
        leak()
        drop.attack()
        return "held"

    kind, text = in_child(action)
    assert kind == EnforcementError.__name__
    assert names in text


def test_become_warden_has_exactly_two():
    def action():
        drop.become_warden(1, 1)
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
        return state()

    got = in_child(action)
    two = f"{1 << 12 | 1 << 13:016x}"
    assert [got[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == [[two]] * 5
    assert got["Uid"] == ["1"] * 4
    assert got["NoNewPrivs"] == ["1"]


def test_missing_setpcap_is_said_with_a_hint():
    def action():
        all_but = drop.held() - {drop.CAP_SETPCAP}
        drop.capset(all_but, effective=all_but, inheritable=())
        drop.drop_to(UID, UID)

    kind, text = in_child(action)
    assert kind == PrivilegeError.__name__
    assert text == "missing capability SETPCAP\nhint: cap_add: [SETPCAP] in compose.yaml, or --cap-add"


def test_writing_as_the_owner_of_a_folder(tmp_path):
    folder = tmp_path / "owned"
    folder.mkdir(mode=0o755)
    os.chown(folder, 1, 1)
    for closed in (tmp_path, *list(tmp_path.parents)[:2]):  # pytest's own folders, not /tmp
        os.chmod(closed, 0o755)

    def action():
        drop.become_keeper()  # no DAC_OVERRIDE
        try:
            (folder / "as_root").touch()
        except PermissionError:
            with drop.as_owner(str(folder)):
                (folder / "as_owner").touch()
        return [os.geteuid(), sorted(os.listdir(folder))]

    assert in_child(action) == [0, ["as_owner"]]
