"""What is in the image, and what is not."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support.engine import BASE, client, image_size

MB = 1_000_000
FILE_CAPABILITIES = """
import os
for folder, _, names in os.walk('/usr'):
    for path in (os.path.join(folder, name) for name in names):
        if not os.path.islink(path) and 'security.capability' in os.listxattr(path):
            print(path)
"""


def inside(world, script, image="initd:local"):
    run = ("run", "--rm", "--network", "none", "--entrypoint", "/bin/sh", image, "-c")
    return world.engine.docker(*run, f"PATH=/usr/sbin:/usr/bin:/sbin:/bin; {script}").stdout


def test_nothing_raises_privilege(world):
    assert inside(world, "find / -xdev -type f -perm /6000") == ""
    assert inside(world, f'/usr/bin/python3 -c "{FILE_CAPABILITIES}"') == ""


def test_the_check_finds_one_where_there_is_one(world):
    """The negative control: the base image has several."""
    assert "/usr/bin/su" in inside(world, "find / -xdev -type f -perm /6000", image=BASE)


def test_neither_compiler_nor_sudo_nor_pip_for_our_own(world):
    for tool in ("gcc", "cc", "g++", "make", "sudo", "doas", "pkexec"):
        assert inside(world, f"command -v {tool} || echo none") == "none\n"
    assert inside(world, "ls /opt/initd/bin | grep -c pip || true") == "0\n"


def test_tools_that_people_expect(world):
    tools = "git curl jq rg less zsh bash ssh python3 ps setpriv iptables-legacy-save ipset nft"
    assert inside(world, f"for tool in {tools}; do command -v $tool >/dev/null || echo $tool; done") == ""


def test_our_code_is_compiled(world):
    script = "cd /opt/initd/lib/python3*/site-packages/initd && ls *.py | wc -l && ls __pycache__/*.pyc | wc -l"
    sources, compiled = inside(world, script).split()
    assert sources == compiled


def test_nobody_but_root_writes_what_root_runs(world):
    script = "find /opt /usr /etc -xdev \\( -not -user root -o -perm /022 \\) -not -type l -print"
    assert inside(world, script) == ""


def test_what_the_engine_reads(world):
    config = json.loads(world.engine.docker("image", "inspect", "initd:local").stdout)[0]["Config"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "fwctl", "health"]
    assert config["Entrypoint"][:3] == ["/usr/bin/env", "--block-signal", "/usr/local/bin/initd"]
    assert config["User"] == ""
    assert config["Labels"]["org.opencontainers.image.licenses"] == "MIT"
    assert any(word.startswith("PATH=/usr/local/lib/initd/shims:") for word in config["Env"])


def test_size_without_claude(world):
    size, base = image_size(world.engine, "initd:none"), image_size(world.engine, BASE)
    print(f"debian target without Claude: {size / MB:.0f} MB unpacked, {(size - base) / MB:.0f} MB of it ours")
    assert size < 250 * MB


@pytest.mark.slow
def test_size_packed(world):
    """At a quick level: what a registry stores is a little smaller."""
    save = subprocess.Popen([client(), "save", "initd:local"], stdout=subprocess.PIPE, env=world.engine.environ())
    pack = subprocess.Popen(["gzip", "-4"], stdin=save.stdout, stdout=subprocess.PIPE)
    assert save.stdout
    assert pack.stdout
    save.stdout.close()
    size = 0
    while data := pack.stdout.read(1 << 20):
        size += len(data)
    assert (save.wait(), pack.wait()) == (0, 0)
    print(f"debian target with Claude: {size / MB:.0f} MB packed")
    assert size < 280 * MB


def test_claude_can_be_mounted_instead(make, tmp_path):
    own = tmp_path / "claude"
    own.write_text("#!/bin/sh\necho own claude as $(id -u)\n")
    own.chmod(0o755)
    tmp_path.chmod(0o755)
    mount = f"{own}:/usr/local/bin/claude:ro"
    project = make(environ={"CLAUDE_IMAGE": "initd:none"}, override={"services": {"claude": {"volumes": [mount]}}}).up()
    assert project.output("claude") == "own claude as 501\n"


def test_each_capability_is_needed(make):
    """Take away any one that compose.yaml adds: the box does not come up. What is listed is not more than needed."""
    project = make()
    config = json.loads(project.compose("config", "--format", "json").stdout)
    listed = config["services"]["claude"]["cap_add"]
    assert config["services"]["claude"]["cap_drop"] == ["ALL"]
    for name in listed:
        other = make(environ={"CLAUDE_UID": "1000", "CLAUDE_GID": "1000"}, uid=1000)
        other.change(lambda service, name=name: service["cap_add"].remove(name))
        done = other.compose("up", "-d", "--wait")
        assert done.returncode != 0, f"{name} is not needed"
        assert name in other.logs(), other.logs()
        other.down()
