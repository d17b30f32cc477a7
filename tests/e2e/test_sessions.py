"""Sessions in the box: who they are, what they may, and that the box does not mind how many there are."""

from __future__ import annotations

import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

STATUS = "/proc/self/status"
SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
EMPTY = "0" * 16
PYTHON = f"print(open('{STATUS}').read())"
NODE = f"console.log(require('fs').readFileSync('{STATUS}', 'utf8'))"


def parse(status: str) -> dict[str, str]:
    return {key: " ".join(value.split()) for key, _, value in (line.partition(":") for line in status.splitlines())}


def dropped(status: str, *, uid: int = 501, gid: int = 501) -> None:
    found = parse(status)
    assert found["Uid"] == " ".join([str(uid)] * 4)
    assert found["Gid"] == " ".join([str(gid)] * 4)
    assert found["Groups"] == ""
    assert {name: found[name] for name in SETS} == dict.fromkeys(SETS, EMPTY)
    assert found["NoNewPrivs"] == "1"


def test_up_is_healthy(shared):
    assert shared.inspect()["State"]["Health"]["Status"] == "healthy"
    assert shared.exec("fwctl", "health").returncode == 0


def test_claude_itself(shared):
    assert re.match(r"\d+\.\d+\.\d+ \(Claude Code\)", shared.output("claude", "--version"))


def test_ten_execs(shared):
    for number in range(10):
        assert shared.output("sh", "-c", f"echo {number}") == f"{number}\n"
    assert shared.inspect()["State"]["Running"]


@pytest.mark.parametrize(
    "command",
    [
        ["cat", STATUS],
        ["bash", "-c", f"cat {STATUS}"],
        ["bash", "-lc", f"cat {STATUS}"],
        ["sh", "-c", f"cat {STATUS}"],
        ["zsh", "-c", f"cat {STATUS}"],
        ["python3", "-c", PYTHON],
        ["env", "cat", STATUS],
    ],
    ids=lambda command: " ".join(command)[:12],
)
def test_sessions_have_nothing(shared, command):
    dropped(shared.output(*command))


def test_memory_that_runs_out_ends_a_session_first(shared):
    kept, session = shared.output("cat", "/proc/1/oom_score_adj", "/proc/self/oom_score_adj").split()
    assert int(session) == int(kept) + 100


def test_without_the_shims_a_session_would_have_it_all(shared):
    """The negative control: the same exec by path, past the shims, is root with the container's capabilities."""
    found = parse(shared.output("/bin/cat", STATUS))
    assert found["Uid"] == "0 0 0 0"
    assert found["CapEff"] != EMPTY


def test_as_a_named_user(shared):
    found = parse(shared.output("bash", "-c", f"cat {STATUS}", flags=["-u", "501:501"]))
    assert found["Uid"] == "501 501 501 501"
    assert found["NoNewPrivs"] == "1"
    assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {EMPTY}


def test_who_and_where(shared):
    said = shared.output("bash", "-c", 'id -un; id -gn; echo "$HOME $USER $LOGNAME"; pwd')
    assert said.split("\n") == ["claude", "claude", "/home/claude claude claude", "/workspace", ""]


def test_flags_of_exec(shared):
    said = shared.output(
        *("bash", "-c", 'echo "$name $HOME"; pwd; cat'),
        flags=["-e", "name=value with spaces", "-e", "HOME=/tmp", "--workdir", "/usr"],
        text="from stdin",
    )
    assert said == "value with spaces /tmp\n/usr\nfrom stdin"


def test_arguments_and_codes_pass_through(shared):
    assert shared.output("printf", "%s|", "a b", "", "*", "-x", "$HOME") == "a b||*|-x|$HOME|"
    assert shared.exec("sh", "-c", "exit 42").returncode == 42
    missing = shared.exec("go", "version")
    assert (missing.returncode, missing.stderr) == (127, "initd: go: not in this image\n")


def test_root_on_purpose(shared):
    found = parse(shared.output("rootsh", "-c", f"cat {STATUS}"))
    assert found["Uid"] == "0 0 0 0"
    assert found["CapEff"] != EMPTY
    refused = shared.exec("bash", "-c", "rootsh -c id")
    assert refused.returncode == 77
    assert "only from the host" in refused.stderr


def wait_for_sleep(project):
    """Until a `sleep 1000` runs in the box: what is typed before goes to somebody else."""
    until = time.monotonic() + 60
    while "sleep 1000\n" not in project.output("ps", "-eo", "args="):
        assert time.monotonic() < until


def test_control_c_ends_the_command_and_not_the_box(shared):
    terminal = shared.terminal("bash", "--norc")
    terminal.type("sleep 1000; echo code=$?\n")
    wait_for_sleep(shared)
    terminal.type("\x03")
    terminal.expect("^C")
    terminal.type("echo still $((6 * 7))\n")
    terminal.expect("still 42")
    terminal.type("exit\n")
    terminal.close()
    assert shared.inspect()["State"]["Health"]["Status"] == "healthy"


def test_control_c_on_the_command_itself(shared):
    terminal = shared.terminal("sleep", "1000")
    wait_for_sleep(shared)
    terminal.type("\x03")
    assert terminal.close() == 130
    assert shared.inspect()["State"]["Running"]


@pytest.mark.slow
def test_two_hundred_at_once(shared):
    """Also a bound for what a session costs the box: nothing stays behind."""
    with ThreadPoolExecutor(200) as pool:
        codes = list(pool.map(lambda n: shared.exec("sh", "-c", f"exit {n % 5}", timeout=900).returncode, range(200)))
    assert codes == [n % 5 for n in range(200)]
    until = time.monotonic() + 60
    while shared.inspect()["State"]["Health"]["Status"] != "healthy":  # the crowd may have made a check late
        assert time.monotonic() < until
        time.sleep(1)
    while zombies := shared.output("rootsh", "-c", "ps -eo stat=,pid=,args= | grep ^Z || true"):  # one just ended, say
        assert time.monotonic() < until, zombies
        time.sleep(1)


def test_what_a_shim_costs(shared):
    """Under 15 ms: the median of 40 runs through the shim, less the median of the same program without it.

    The best of up to five such medians, on a machine that is busy elsewhere.
    """
    script = """
import os, statistics, subprocess, sys, time
spans = {'/usr/local/lib/initd/shims/true': [], '/usr/bin/true': []}
for _ in range(40):
    for path in spans:
        start = time.perf_counter(); subprocess.run([path], check=True); spans[path].append(time.perf_counter() - start)
through, without = map(statistics.median, spans.values())
print((through - without) * 1000)
"""
    costs = []
    while not costs or (min(costs) >= 15 and len(costs) < 5):
        costs.append(float(shared.output("rootsh", "-c", f'/usr/bin/python3 -c "{script}"')))
    print(f"a shim costs {min(costs):.1f} ms")
    assert min(costs) < 15, costs


def test_nothing_is_left_of_the_shims_inside(shared):
    assert "shims" not in shared.output("sh", "-c", "echo $PATH")
    assert shared.output("sh", "-c", "command -v git") == "/usr/bin/git\n"


def test_files_belong_to_the_user_on_the_host(shared):
    shared.output("touch", "/workspace/by-name")
    shared.output("bash", "-c", "mkdir /workspace/d && echo x >/workspace/d/f")
    for name in ("by-name", "d", "d/f"):
        info = (shared.workspace / name).stat()
        assert (info.st_uid, info.st_gid) == (501, 501)


def test_run(shared):
    """`compose run` starts a second box: PID 1's command is a session too, and its code comes back."""
    done = shared.compose("run", "--rm", "-T", shared.service, "sh", "-c", f"cat {STATUS}; exit 7")
    assert done.returncode == 7, done.stderr
    dropped(done.stdout)


def test_exec_during_start_waits(make):
    """A session that comes before the box is armed gets its turn afterwards; it never runs unguarded."""
    project = make()
    project.compose("create")
    project.compose("start")
    first = project.exec("sh", "-c", "cat /run/initd/ready >/dev/null && echo armed")
    assert first.stdout == "armed\n", first.stderr


def test_exec_in_a_box_that_is_not_ready_says_so(make):
    """Something else as PID 1 never becomes ready: the shim gives up in bounded time, with a reason."""
    project = make(override={"services": {"claude": {"entrypoint": ["/bin/sleep", "1000"]}}})
    project.compose("up", "-d")
    started = time.monotonic()
    done = project.exec("sh", "-c", "echo ran", flags=["-e", "SHIM_WAIT=1"])
    assert (done.returncode, done.stdout) == (75, "")
    assert "not ready after 1 s" in done.stderr
    assert time.monotonic() - started < 30  # without being told it waits for 60


def test_a_stale_ready_file_opens_nothing(make):
    """`ready` counts only if it names a keeper whose parent has dropped: here PID 1 is still root."""
    project = make(override={"services": {"claude": {"entrypoint": ["/bin/sleep", "1000"]}}})
    project.compose("up", "-d")
    for stale in ("1", "99999", "self", ""):
        project.compose("exec", "-T", "claude", "/bin/sh", "-c", f"echo {stale} >/run/initd/ready")
        done = project.exec("sh", "-c", "echo ran", flags=["-e", "SHIM_WAIT=0"])
        assert (done.returncode, done.stdout) == (75, ""), stale


def test_node_too(make):
    project = make(environ={"CLAUDE_IMAGE": "initd:node"}).up()
    dropped(project.output("node", "-e", NODE))


def test_history_is_kept(make):
    project = make().up()
    for shell in ("bash", "zsh"):
        terminal = project.terminal(shell)
        terminal.type(f"echo remember-{shell}-$((1+1))\n")
        terminal.expect(f"remember-{shell}-2")
        terminal.type("exit\n")
        terminal.close()
    project.compose("up", "-d", "--force-recreate", "--wait")
    for shell in ("bash", "zsh"):
        assert f"remember-{shell}" in project.output("cat", f"/home/claude/.history/{shell}")


def test_the_host_can_edit_what_a_session_made(shared):
    shared.output("sh", "-c", "umask 022; echo theirs >/workspace/edited")
    edit = "import os; os.setresgid(501, 501, 501); os.setresuid(501, 501, 501); open('edited', 'a').write('mine\\n')"
    subprocess.run(["/usr/bin/python3", "-c", edit], cwd=shared.workspace, check=True, env=dict(os.environ))
    assert shared.output("cat", "/workspace/edited") == "theirs\nmine\n"
