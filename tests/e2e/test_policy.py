"""Who may change what the box may reach: the host, at any time and without a restart; a session, never."""

from __future__ import annotations

import pytest

from tests.support.project import POLICY

CURL = ("curl", "-sS", "--max-time", "8")
INSIDE = f"/workspace/{POLICY}"


def reached(project, name="other.example"):
    return project.exec(*CURL, f"https://{name}/").returncode == 0


def test_reload_from_the_host_widens_and_narrows(make):
    project = make().up()
    assert not reached(project)
    project.write_policy("site.example\nother.example\n")
    assert "other.example" in project.output("fwctl", "reload")
    assert reached(project)
    project.write_policy("site.example\n")
    project.output("fwctl", "reload")
    assert not reached(project)
    assert reached(project, "site.example")


def test_a_bad_file_changes_nothing(make):
    project = make().up()
    project.write_policy("site.example\n*.com\n")
    refused = project.exec("fwctl", "reload")
    assert refused.returncode == 78
    assert "allowed-domains.txt:2" in refused.stderr
    assert reached(project, "site.example")


@pytest.mark.parametrize(
    "attempt",
    [
        f"echo other.example >>{INSIDE}",
        f"rm -f {INSIDE}",
        f"mv {INSIDE} /tmp/",
        "mv /workspace/.aidevcontainer /workspace/gone",
        "rm -rf /workspace/.aidevcontainer",
        f"echo other.example >/tmp/p && mv -f /tmp/p {INSIDE}",
        f"ln -sf /tmp/p {INSIDE}",
        "mount -t tmpfs none /workspace/.aidevcontainer",
        "mount --bind /tmp /workspace/.aidevcontainer",
        "mount -o remount,rw /workspace/.aidevcontainer",
        "umount /workspace/.aidevcontainer",
        "unshare -Urm mount -t tmpfs none /workspace/.aidevcontainer",
        f"chmod 777 {INSIDE}",
    ],
)
def test_a_session_cannot_touch_the_policy(shared, attempt):
    before = (shared.workspace / POLICY).read_text()
    done = shared.exec("bash", "-c", attempt)
    assert done.returncode != 0, f"{attempt}: {done.stdout}{done.stderr}"
    shared.exec("bash", "-c", "fwctl reload")
    assert (shared.workspace / POLICY).read_text() == before
    assert not reached(shared)


def test_the_root_of_the_box_cannot_either(shared):
    """Not even a root shell: the mount is read-only, and there is neither DAC_OVERRIDE nor SYS_ADMIN."""
    before = (shared.workspace / POLICY).read_text()
    for attempt in (f"echo other.example >>{INSIDE}", "mount -o remount,rw /workspace/.aidevcontainer"):
        assert shared.exec("rootsh", "-c", attempt).returncode != 0
    done = shared.exec("rootsh", "-c", f"setpriv --reuid 501 --clear-groups sh -c 'echo other.example >>{INSIDE}'")
    assert "Read-only" in done.stderr
    assert (shared.workspace / POLICY).read_text() == before


def test_a_session_that_may_write_the_file_may_only_narrow(make):
    """The folder mounted writable, against advice: it is said, and a widening needs root."""
    project = make()
    mount = f"{project.workspace}/.aidevcontainer:/workspace/.aidevcontainer:rw"
    project.change(lambda service: service["volumes"].append(mount))
    project.up()
    project.output("bash", "-c", f"echo other.example >>{INSIDE}")
    refused = project.exec("bash", "-c", "fwctl reload")
    assert refused.returncode != 0
    assert "narrow" in refused.stderr
    assert not reached(project)
    assert "writable" in project.output("fwctl", "status")
    project.output("fwctl", "reload")
    assert reached(project)


def test_nothing_in_the_workspace_becomes_code_of_ours(make):
    """The workspace is PID 1's folder and the agent's: no module of ours is ever imported from there."""
    project = make()
    trap = "open('/workspace/caught', 'w').close()\n"
    for name in ("json.py", "asyncio.py", "structlog.py", "sitecustomize.py", "initd/__init__.py", "iptc/__init__.py"):
        path = project.workspace / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(trap)
    (project.workspace).chmod(0o777)
    project.up()
    project.output("fwctl", "status")
    project.output("fwctl", "verify")
    assert not (project.workspace / "caught").exists()
