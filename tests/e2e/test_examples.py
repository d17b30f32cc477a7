"""Every example does what its README says, in the lab's internet."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.support.project import POLICY


@pytest.fixture
def example(world, make):
    def start(name, **options):
        """A copy of the example in a folder beside the repository's compose.yaml, as it is in a checkout."""
        folder = world.context / "examples" / name
        project = make(files=[folder / "compose.yaml"], policy=(folder / POLICY).read_text(), **options)
        shutil.copytree(folder, project.workspace, dirs_exist_ok=True, symlinks=True)
        for path in project.workspace.rglob("*"):
            shutil.chown(path, project.uid, project.uid) if not path.is_symlink() else None
        return project

    return start


def commands(world, name):
    """What the README tells to type, after `docker compose exec`."""
    text = (world.context / "examples" / name / "README.md").read_text()
    return re.findall(r"^docker compose exec (.*)$", text, re.MULTILINE)


def listed(world, *names):
    for number, name in enumerate(names):
        world.lab.dns.set(name, {"A": f"203.0.113.{100 + number}"})


@pytest.fixture(autouse=True)
def fresh_internet(world):
    yield
    world.lab.reset()


def test_quickstart(world, example):
    listed(world, "registry.npmjs.org", "crates.io")
    project = example("quickstart").up()
    assert project.output("curl", "-sS", "https://registry.npmjs.org/") == "hello from registry.npmjs.org\n"
    assert project.exec("curl", "-sS", "https://crates.io/").returncode == 6
    assert "Claude Code" in project.output("claude", "--version")
    project.write_policy((project.workspace / POLICY).read_text() + "crates.io\n")
    project.output("fwctl", "reload")
    assert "allowed" in project.output("fwctl", "test", "crates.io:443")
    assert project.output("curl", "-sS", "https://crates.io/") == "hello from crates.io\n"


def test_python_project(world, example):
    listed(world, "pypi.org", "crates.io")
    project = example("python-project").up()
    project.output("python3", "-m", "venv", ".venv")
    assert "pip" in project.output("bash", "-c", ". .venv/bin/activate && pip --version")
    fetch = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=8).read().decode())"
    assert project.output("python3", "-c", fetch, "https://pypi.org/") == "hello from pypi.org\n\n"
    refused = project.exec("python3", "-c", fetch, "https://crates.io/")
    assert "Name or service not known" in refused.stderr
    assert (project.workspace / ".venv").stat().st_uid == 501


def test_node_project(world, example):
    listed(world, "registry.npmjs.org", "unlisted.example")
    project = example("node-project").up()
    said = project.output("node", "check.mjs").splitlines()
    assert said == ["https://registry.npmjs.org/ 200", "https://unlisted.example/ ENOTFOUND at once"]


def test_private_registry(world, example):
    project = example("private-registry").up()
    venv, install, other = commands(world, "private-registry")
    assert other == "claude curl http://payroll:8000/"
    project.output(*venv.removeprefix("claude ").split())
    script = install.removeprefix("claude bash -c ").strip("'")
    assert project.output("bash", "-c", script).endswith("hello from the private registry\n")
    assert project.exec(*other.removeprefix("claude ").split()).returncode == 6


def connects(project, host, port=443):
    """Whether a plain image, which has no curl, gets through: bash opens the connection."""
    done = project.exec("bash", "-c", f"exec 3<>/dev/tcp/{host}/{port}", timeout=30)
    return done.returncode == 0


def test_sidecar(world, example):
    project = example("sidecar", service="firewall")
    project.up()
    app = project.of("app")
    status = dict(line.split(":", 1) for line in app.output("cat", "/proc/self/status").splitlines())
    assert {status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    assert app.output("getent", "ahostsv4", "site.example").startswith("203.0.113.10")
    assert connects(app, "site.example")
    assert not connects(app, "other.example")
    world.lab.clear()
    assert not connects(app, "203.0.113.20")
    assert not connects(app, "203.0.113.20", 53), "the engine's resolver may ask anybody as root; the app is not root"
    assert world.lab.packets(to="203.0.113.20") == []
    project.write_policy("site.example\nother.example\n")
    assert "other.example" in project.output("fwctl", "reload")
    assert connects(app, "other.example")
