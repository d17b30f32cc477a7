"""The box's life as an engine leads it: start, stop, kill, restart, an engine that goes away and comes back."""

from __future__ import annotations

import json
import re
import threading
import time

import pytest

OTHER = "203.0.113.20"
CURL = ("curl", "-sS", "--max-time", "15")
QUICK = 5.0  # seconds, the compose client's own among them; the box's grace is 8, then everybody is killed


def stopped(project, *words):
    """Seconds that `compose WORDS` took, and the container's exit code."""
    started = time.monotonic()
    done = project.compose(*words)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - started, project.inspect()["State"]["ExitCode"]


def enforced(project):
    assert project.output(*CURL, "https://site.example/") == "hello from site.example\n"
    assert project.exec(*CURL, f"http://{OTHER}/").returncode == 7


def test_stop_is_quick_and_clean(make):
    project = make().up()
    seconds, code = stopped(project, "stop")
    assert code == 0
    assert seconds < QUICK


def test_stop_with_sessions_at_work(make):
    project = make().up()
    terminal = project.terminal("bash", "-c", "trap 'echo said goodbye; exit 0' TERM; echo here; sleep 1000 & wait")
    terminal.expect("here")
    seconds, code = stopped(project, "stop")
    terminal.expect("said goodbye")
    terminal.close()
    assert code == 0
    assert seconds < QUICK


def test_the_commands_own_code(make):
    project = make(override={"services": {"claude": {"command": ["sh", "-c", "id -u; exit 3"]}}})
    project.compose("up", "-d")
    until = time.monotonic() + 60
    while project.inspect()["State"]["Running"]:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert project.inspect()["State"]["ExitCode"] == 3
    assert re.search(r"^.*\b501$", project.logs(), re.MULTILINE)


def test_kill_and_start_again(make):
    project = make().up()
    assert stopped(project, "kill")[1] == 137
    project.up()
    enforced(project)


@pytest.mark.parametrize("how", ["restart", "engine-restart"])
def test_restart_leaks_nothing(world, make, how):
    """Sessions knock all the time, by name and by address, while the box goes down and comes up."""
    project = make().up()
    world.lab.clear()
    over = threading.Event()
    ran = []

    def knock():
        while not over.is_set():
            done = project.exec(
                "sh", "-c", f"echo ran; curl -sS -m 1 http://{OTHER}/; curl -sS -m 1 http://other.example/"
            )
            ran.append(done.stdout)

    threads = [threading.Thread(target=knock) for _ in range(3)]
    for thread in threads:
        thread.start()
    if how == "restart":
        project.compose("restart")
    else:
        project.engine.docker("restart", project.container())
    project.up()
    until = time.monotonic() + 60
    while sum("ran" in one for one in list(ran)) <= 3 and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1)
    over.set()
    for thread in threads:
        thread.join()
    assert sum("ran" in one for one in ran) > 3
    assert not any("hello" in one for one in ran)
    assert world.lab.packets(to=OTHER) == []
    assert world.lab.dns.queries("other.example") == []
    enforced(project)


@pytest.mark.parametrize("kill", [False, True], ids=["graceful", "killed"])
def test_engine_restart_with_live_restore(world, make, kill):
    project = make().up()
    before = project.inspect()["State"]["StartedAt"]
    project.output("sh", "-c", "nohup sleep 1000 >/dev/null 2>&1 & echo $! >/tmp/pid")
    world.engine.restart(kill=kill)
    assert project.inspect()["State"]["StartedAt"] == before
    project.output("sh", "-c", "kill -0 $(cat /tmp/pid)")
    enforced(project)


def test_under_the_engines_own_init(make):
    project = make(override={"services": {"claude": {"init": True}}}).up()
    enforced(project)
    assert "docker-init" in project.output("cat", "/proc/1/comm") + project.output("cat", "/proc/1/cmdline")
    assert project.output("id", "-u") == "501\n"
    seconds, code = stopped(project, "stop")
    assert (code, seconds < QUICK) == (0, True)


def test_nftables_in_the_image_too(make):
    """Its libnftables is another than this machine's; what it lists must be what was written."""
    project = make(environ={"INITD_BACKEND": "nftables"}).up()
    assert "backend nftables" in project.output("fwctl", "status")
    enforced(project)
    assert project.exec("rootsh", "-c", "fwctl audit --for 1m").returncode == 0
    assert project.exec("fwctl", "health").returncode == 0
    assert project.exec(*CURL, f"http://{OTHER}/").returncode == 0


def test_without_net_admin(make):
    project = make()
    project.change(lambda service: service["cap_add"].remove("NET_ADMIN"))
    done = project.compose("up", "-d", "--wait")
    assert done.returncode != 0
    assert "exited (77)" in done.stderr
    lines = [line.partition("| ")[2] for line in project.logs().splitlines()]
    assert [line for line in lines if line.startswith("initd: ")] == ["initd: missing capability NET_ADMIN"]
    assert any(line.startswith("hint: ") for line in lines)
    assert len(lines) <= 4


def test_a_bad_policy_is_explained(make):
    project = make(policy="site.example\n*.com\nbad line\n")
    assert project.compose("up", "-d", "--wait").returncode != 0
    assert project.inspect()["State"]["ExitCode"] == 78
    logs = project.logs()
    assert "allowed-domains.txt:2" in logs
    assert "allowed-domains.txt:3" in logs


def test_exec_after_a_failed_start_says_why(make):
    """The engine keeps trying; whoever execs into one of the tries reads what was wrong with the last."""
    project = make(policy="*.com\n")
    project.change(lambda service: service.update(restart="always"))
    project.compose("up", "-d")
    until = time.monotonic() + 120
    said = ""
    while "allowed-domains.txt:1" not in said:
        assert time.monotonic() < until, said
        said += project.exec("bash", "-c", "echo ran").stderr
    assert "the last start failed" in said
    project.write_policy("site.example\n")
    project.up()
    assert project.output("bash", "-c", "echo ran") == "ran\n"
    assert project.exec("bash", "-c", "echo ran").stderr == ""


def test_logs_read_well(make):
    project = make().up()
    lines = [line.partition("| ")[2] for line in project.logs().splitlines()]
    assert not [line for line in lines if line.startswith("{") or "\x1b" in line or "Traceback" in line]
    assert any("init.ready" in line for line in lines)


def test_logs_as_json(make):
    project = make(environ={"INITD_LOG_FORMAT": "json"}).up()
    lines = [line.partition("| ")[2] for line in project.logs().splitlines()]
    events = [json.loads(line)["event"] for line in lines]
    assert "init.ready" in events
