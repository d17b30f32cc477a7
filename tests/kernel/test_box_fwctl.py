"""`fwctl`, every command: text for people, JSON for programs, exit codes for scripts; with a box and without."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from initd import __version__
from tests.support import holding, product
from tests.support.attempts import attempt
from tests.support.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.box import Box

pytestmark = pytest.mark.kernel

COMMANDS = {
    "status": ("status",),
    "reload": ("reload",),
    "check": ("check",),
    "test": ("test", "site.example"),
    "health": ("health",),
    "verify": ("verify",),
    "version": ("version",),
}


@pytest.fixture(scope="module")
def scene() -> Iterator[tuple[Lab, Box]]:
    with Lab() as lab:
        box = lab.box(policy=f"{holding.POLICY}*.deep.example\n!no.deep.example\n")
        box.start()
        yield lab, box


@pytest.mark.parametrize("user", ["root", "session"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_as_text_and_as_json(scene: tuple[Lab, Box], name: str, user: str) -> None:
    text = scene[1].fwctl(*COMMANDS[name], user=user)
    assert (text.returncode, text.stderr) == (0, "")
    assert text.stdout.endswith("\n")
    assert "{" not in text.stdout
    assert "\x1b" not in text.stdout, "colour is for terminals"
    answer = scene[1].fwctl(*COMMANDS[name], "--json", user=user)
    assert answer.returncode == 0
    assert isinstance(json.loads(answer.stdout), dict)


def test_status_says_what_is_in_force(scene: tuple[Lab, Box]) -> None:
    _, box = scene
    status = box.status()
    assert status["ready"] is True
    assert status["version"] == __version__
    assert status["user"] == {"uid": 501, "gid": 501}
    assert (status["policy"]["names"], status["policy"]["wildcards"], status["policy"]["exceptions"]) == (2, 1, 1)
    assert status["warnings"] == []
    before = sum(status["refused"].values())
    attempt(box, ("tcp", "203.0.113.20", 443))
    assert sum(box.status()["refused"].values()) > before, "a refusal is counted"
    assert "enforcing" in box.fwctl("status").stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("site.example", 0, "allowed: listed\n  line 1: site.example"),
        ("site.example:22", 0, "allowed"),
        ("site.example:25", 1, "refused: listed, but only for"),
        ("v4.example:80", 1, "refused: listed, but only for 443/tcp\n  line 2: v4.example:443"),
        ("a.deep.example", 0, "allowed: listed\n  line 3: *.deep.example"),
        ("no.deep.example", 1, "refused: an exception line says never\n  line 4: !no.deep.example"),
        ("203.0.113.10", 0, "allowed"),
        ("203.0.113.10:25", 1, "refused"),
        ("203.0.113.20", 1, "refused: not listed"),
        ("169.254.169.254:80", 1, "refused: in the special range 169.254.0.0/16"),
        ("https://site.example/", 64, ""),
    ],
)
def test_test_foretells_what_happens(scene: tuple[Lab, Box], target: str, code: int, words: str) -> None:
    done = scene[1].fwctl("test", target)
    assert done.returncode == code, done
    assert words in done.stdout
    if code == 64:
        assert "hint: for example github.com:443" in done.stderr
        return
    host, _, port = target.partition(":")
    if not host.endswith("deep.example"):
        happened = attempt(scene[1], ("tcp", host, int(port or 443)))
        assert (happened.error is None) is (code == 0), happened


def test_check_reads_a_file_before_it_counts(scene: tuple[Lab, Box]) -> None:
    _, box = scene
    (box.workspace / "good.txt").write_text("github.com\n@npm\n")
    (box.workspace / "bad.txt").write_text("ok.example\n*\nhttps://example.com/\n")
    good, bad = box.fwctl("check", "/workspace/good.txt"), box.fwctl("check", "/workspace/bad.txt", user="session")
    assert (good.returncode, bad.returncode) == (0, 78)
    assert "valid" in good.stdout
    assert "bad.txt:2:1:" in bad.stderr
    assert "bad.txt:3:1:" in bad.stderr
    issues = json.loads(box.fwctl("check", "--json", "/workspace/bad.txt").stdout)["issues"]
    assert [issue["line"] for issue in issues] == [2, 3]
    piped = box.exec([str(product.FWCTL), "check", "-"], text="*.com\n")
    assert piped.returncode == 78
    assert box.fwctl("check", "/workspace/none.txt").returncode == 78


@pytest.mark.parametrize("arguments", [(), ("frobnicate",), ("test",), ("status", "--yes"), ("check", "a", "b")])
def test_wrong_usage_is_64(scene: tuple[Lab, Box], arguments: tuple[str, ...]) -> None:
    done = scene[1].fwctl(*arguments)
    assert done.returncode == 64
    assert "usage: fwctl" in done.stderr
    assert "hint:" in done.stderr


def test_health_and_verify_say_no_when_it_is_no(lab: Lab) -> None:
    box = lab.box(policy=holding.POLICY)
    box.start()
    for command in ("health", "verify"):
        assert box.fwctl(command).returncode == 0
    holding.flush(lab, box.status()["backend"])
    for command in ("health", "verify"):
        done = box.fwctl(command)
        assert done.returncode == 1
        assert "FAIL" in done.stdout
        assert (
            json.loads(box.fwctl(command, "--json").stdout).get({"health": "healthy", "verify": "verified"}[command])
            is False
        )


def test_health_sees_a_silent_guard(lab: Lab) -> None:
    """The keeper replaces a warden that has stopped; until then nobody is told that all is well."""
    box = lab.box(policy=holding.POLICY)
    box.start()
    warden = box.pids()["warden"]
    os.kill(warden, signal.SIGSTOP)
    try:
        argv = [str(product.FWCTL), "health"]
        with box.popen(argv) as asking:
            time.sleep(0.5)
            assert asking.poll() is None, "no answer, rather than a good one"
            asking.kill()
    finally:
        os.kill(warden, signal.SIGCONT)
    assert box.fwctl("health").returncode == 0


def test_while_the_warden_is_away_it_waits_and_then_answers(lab: Lab) -> None:
    box = lab.box(policy=holding.POLICY)
    box.start()
    for generation in (2, 3):
        os.kill(box.pids()["warden"], signal.SIGKILL)
        done = box.fwctl("status", "--json")
        assert done.returncode == 0, done.stdout
        assert json.loads(done.stdout)["generation"] == generation


def test_when_the_keeper_is_gone_too_it_says_that_nobody_is_there(lab: Lab) -> None:
    box = lab.box(policy=holding.POLICY)
    box.start()
    pids = box.pids()
    os.kill(pids["keeper"], signal.SIGKILL)
    os.kill(pids["warden"], signal.SIGKILL)
    until = time.monotonic() + 30
    while {"keeper", "warden"} & set(box.pids()) and time.monotonic() < until:
        time.sleep(0.02)
    holding_still = attempt(box, ("tcp", "203.0.113.20", 443))
    assert holding_still.error == "ECONNREFUSED", "and the rules stay"
    for command in ("status", "reload", "verify"):
        assert box.fwctl(command).returncode == 69
    health = box.fwctl("health")
    assert health.returncode == 1
    assert "no box is running here" in health.stdout


@pytest.mark.parametrize(
    ("shell", "code", "words"),
    [
        ("{} check - >/dev/full", 71, "fwctl: No space left on device\n"),
        ("{} check - >&-", 0, ""),
        ("PYTHONIOENCODING=ascii {} check -", 0, ""),
    ],
)
def test_wherever_stdout_goes_there_is_no_traceback(shell: str, code: int, words: str) -> None:
    argv = ["sh", "-c", shell.format(product.FWCTL)]
    done = subprocess.run(argv, capture_output=True, text=True, input="b\u00fccher.example\n", check=False)
    assert (done.returncode, done.stderr) == (code, words)


@pytest.mark.parametrize("name", [*COMMANDS, "doctor"])
def test_without_a_box(tmp_path: Path, name: str) -> None:
    environment = os.environ | {"INITD_RUN_DIR": str(tmp_path), "INITD_POLICY": str(tmp_path / "policy")}
    (tmp_path / "policy").write_text("github.com\n")
    codes = {"check": 0, "version": 0, "health": 1}
    for json_too in ((), ("--json",)):
        argv = [str(product.FWCTL), *COMMANDS.get(name, (name,)), *json_too]
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == codes.get(name, 69), done
        if json_too:
            assert isinstance(json.loads(done.stdout), dict)
        elif done.returncode == 69:
            assert "no box is running here" in done.stderr
            assert "hint: start it with" in done.stderr
