"""The same image under Podman, as root and rootless, started by the very lines of docs/troubleshooting.md."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.support import podman
from tests.support.podman import Podman
from tests.support.remote import RESOLVER4

OTHER = "203.0.113.20"
CURL = ("curl", "-sS", "--max-time", "15")
DOC = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"


def documented() -> dict[str, str]:
    """The command lines of the section on Podman: how to start as root, and rootless."""
    section = DOC.read_text().split("\n## Podman\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return dict(zip(("rootless", "rootful"), blocks, strict=True))


@pytest.fixture(scope="module")
def archive(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "image.tar"
    world.engine.docker("save", "-o", path, "initd:none")
    path.chmod(0o644)
    for folder in path.parents[:3]:
        folder.chmod(folder.stat().st_mode | 0o055)
    return path


@pytest.fixture(scope="module", params=["rootful", "rootless"])
def box(request, world, archive):
    if reason := podman.missing():
        pytest.skip(reason)
    made = Podman(world.lab, rootless=request.param == "rootless", resolver=RESOLVER4)
    try:
        made.load(archive, tag="initd:local")
        made.shell("mkdir .aidevcontainer && echo site.example > .aidevcontainer/allowed-domains.txt")
        started = made.shell(documented()[request.param])
        assert started.returncode == 0, started.stderr
        until = time.monotonic() + 60
        while made.exec("fwctl", "health").returncode:
            assert time.monotonic() < until, made.shell("podman logs claude").stderr
            time.sleep(0.2)
        yield made
    finally:
        made.close()


def test_sessions_have_nothing(box):
    assert box.exec("id", "-u").stdout == "501\n"
    status = box.exec("cat", "/proc/self/status").stdout
    assert set(re.findall(r"^Cap\w+:\s+(\w+)", status, re.MULTILINE)) == {"0" * 16}
    assert box.exec("kill", "-TERM", "1").returncode != 0


def test_listed_answers_and_unlisted_is_refused(world, box):
    assert box.exec(*CURL, "https://site.example/", "-k").stdout == "hello from site.example\n"
    world.lab.clear()
    assert box.exec(*CURL, "http://other.example/").returncode == 6
    assert box.exec(*CURL, f"http://{OTHER}/").returncode == 7
    assert world.lab.packets(to=OTHER) == []
    assert world.lab.dns.queries("other.example") == []
    bare = box.shell(f"podman run --rm --entrypoint /usr/bin/curl initd:local -sS --max-time 5 http://{OTHER}/")
    assert bare.returncode == 0, bare.stderr  # negative control: the network has a way
    assert world.lab.packets(to=OTHER)


def test_reload_and_files(box):
    box.shell("echo other.example >> .aidevcontainer/allowed-domains.txt")
    assert box.exec("fwctl", "reload").returncode == 0
    assert box.exec(*CURL, "http://other.example/").returncode == 0
    assert box.exec("touch", "/workspace/made").returncode == 0
    assert (box.project / "made").stat().st_uid == box.project.stat().st_uid
    assert box.exec("touch", "/workspace/.aidevcontainer/made").returncode != 0


def test_stop_is_quick_and_clean(box):
    began = time.monotonic()
    assert box.shell("podman stop claude").returncode == 0
    assert time.monotonic() - began < 8  # after ten seconds the engine kills
    assert box.shell("podman inspect -f '{{.State.ExitCode}}' claude").stdout == "0\n"
