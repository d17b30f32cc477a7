"""The session's user is decided at start, not when the image is built; home and volumes follow."""

from __future__ import annotations

import os
from pathlib import Path

WHO = "id -u; id -g; id -un; echo $HOME; touch $HOME/x $HOME/.claude/y && echo wrote"


def whoami(project):
    return project.output("bash", "-c", WHO).split()


def owners(project, folder):
    return set(project.output("find", folder, "-printf", "%u\\n").split())


def test_uid_at_run_time_and_then_another(make):
    environ = {"CLAUDE_UID": "1000", "CLAUDE_GID": "1000"}
    project = make(environ=environ, uid=1000).up()
    assert whoami(project) == ["1000", "1000", "claude", "/home/claude", "wrote"]
    project.output("touch", "/workspace/made")
    assert (project.workspace / "made").stat().st_uid == 1000
    project.output("bash", "-c", "cd ~/.claude && mkdir -m 700 -p a/b && echo kept >a/b/c && ln -s /etc/passwd l")
    for path in (project.workspace, *project.workspace.rglob("*")):
        os.chown(path, 1234, 1234)
    project.environ.update(CLAUDE_UID="1234", CLAUDE_GID="1234")
    project.up()
    assert whoami(project) == ["1234", "1234", "claude", "/home/claude", "wrote"]
    assert project.output("cat", "/home/claude/.claude/a/b/c") == "kept\n"
    assert owners(project, "/home/claude/.claude") == {"claude"}
    assert project.output("stat", "-c", "%u", "/etc/passwd") == "0\n"


def test_uid_survives_a_restart(make):
    project = make(environ={"CLAUDE_UID": "1000", "CLAUDE_GID": "1000"}, uid=1000).up()
    project.output("chmod", "700", "/home/claude")
    project.compose("restart")
    project.up()
    assert whoami(project)[-1] == "wrote"


def test_auto_takes_the_owner_of_the_workspace(make):
    project = make(environ={"CLAUDE_UID": "auto", "CLAUDE_GID": "auto"}, uid=4242).up()
    assert whoami(project) == ["4242", "4242", "claude", "/home/claude", "wrote"]


def test_a_foreign_mount_in_home_keeps_its_owner(make, tmp_path):
    """Files of the host's that are mounted into the home folder are nobody's to give away."""
    theirs = tmp_path / "gitconfig"
    theirs.write_text("[user]\n\tname = somebody\n")
    os.chown(theirs, 501, 501)
    Path(tmp_path).chmod(0o755)
    mount = f"{theirs}:/home/claude/.gitconfig"
    project = make(
        environ={"CLAUDE_UID": "1000", "CLAUDE_GID": "1000"},
        uid=1000,
        override={"services": {"claude": {"volumes": [mount]}}},
    ).up()
    assert project.output("git", "config", "user.name") == "somebody\n"
    assert theirs.stat().st_uid == 501


def test_root_is_refused(make):
    project = make(environ={"CLAUDE_UID": "0"})
    assert project.compose("up", "-d", "--wait").returncode != 0
    assert project.inspect()["State"]["ExitCode"] == 78
    assert "0 is root" in project.logs()
