"""A disk that is full or read-only, as a session may make it: the box starts, heals and stops; only its memory goes."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.kernel.test_box_restart import kill_warden
from tests.support.attempts import attempt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.box import Box
    from tests.support.lab import Lab

pytestmark = pytest.mark.kernel

LISTED, UNLISTED = ("tcp", "site.example", 443), ("tcp", "203.0.113.20", 443)


@contextlib.contextmanager
def full(path: Path) -> Iterator[None]:
    """A file system of one page at `path`, and no byte free in it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=755", "tmpfs", str(path)], check=True)
    try:
        (path / "filler").write_bytes(b"x" * 4096)
        with pytest.raises(OSError, match="No space"):
            (path / "more").write_bytes(b"x")
        (path / "more").unlink()
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def assert_works(box: Box) -> None:
    assert attempt(box, LISTED).error is None
    assert attempt(box, UNLISTED).error == "ECONNREFUSED"


def told(box: Box, event: str) -> list[dict]:
    return [one for one in box.logs().events if one["event"] == event]


def test_a_full_disk_keeps_no_box_from_starting(lab: Lab) -> None:
    box = lab.box(policy="site.example\n")
    with full(box.state):
        box.start()
        assert_works(box)
        box.write_policy("site.example\nfour.example\n")
        assert box.fwctl("reload").returncode == 0
        until = time.monotonic() + 30
        while not (told(box, "state.unsaved") and told(box, "upkeep.failed")):
            assert time.monotonic() < until, box.logs().text
            time.sleep(0.1)
        time.sleep(4.5)  # two more turns of what writes every two seconds
        (warning,) = told(box, "state.unsaved")
        assert "No space" in warning["reason"]
        assert [one["duty"] for one in told(box, "upkeep.failed")] == ["_record"], "the refusal is kept in memory"
        assert "203.0.113.20" in box.fwctl("log").stdout
        assert box.stop().code == 0
    assert "Traceback" not in box.logs().text
    assert "nameserver 127.0.0.1\n" not in (box.directory / "etc" / "resolv.conf").read_text()


@pytest.mark.parametrize("backend", ["xtables", "nftables"])
def test_a_warden_comes_back_although_it_cannot_write(lab: Lab, backend: str) -> None:
    box = lab.box(policy="site.example\n", env={"INITD_BACKEND": backend})
    box.start()
    enter = ["nsenter", f"--target={box.pid}", "--mount", "mount"]
    subprocess.run([*enter, "--bind", "/run/initd", "/run/initd"], check=True)
    subprocess.run([*enter, "-o", "remount,bind,ro", "/run/initd"], check=True)
    box.write_policy("four.example\n")
    assert "restart of the warden undoes the reload" in box.fwctl("reload").stdout
    box.write_policy("site.example\n")
    box.fwctl("reload")
    kill_warden(box)
    until = time.monotonic() + 30
    while not told(box, "warden.armed")[1:] and time.monotonic() < until:
        time.sleep(0.05)
    assert len(told(box, "warden.armed")) == 2, box.logs().text
    assert_works(box)
    assert box.stop().code == 0
    assert "nameserver 127.0.0.1\n" not in (box.directory / "etc" / "resolv.conf").read_text()
