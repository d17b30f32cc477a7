"""Who could change the policy file, judged with real files as the warden sees them: without root's rights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from initd.loading import writable_by

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.kernel  # needs root, for files that are other users'

SESSION, WARDEN = 501, 990


def own(path: Path) -> None:
    os.chown(path, SESSION, SESSION)


def close(path: Path) -> None:
    own(path.parent)
    path.parent.chmod(0)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


CASES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "another user's": (lambda path: None, False),
    "its own": (own, True),
    "its group's": (lambda path: (os.chown(path, 0, SESSION), path.chmod(0o664)), True),
    "everybody's": (lambda path: path.chmod(0o646), True),
    "in its own directory": (lambda path: own(path.parent), True),
    "in its own directory, which is closed now": (close, True),
    "in another user's directory, which is closed": (lambda path: path.parent.chmod(0), False),
    "in a sticky directory": (lambda path: path.parent.chmod(0o1777), False),
    "missing in a sticky directory": (lambda path: (path.unlink(), path.parent.chmod(0o1777)), True),
    "missing in another user's directory": (lambda path: path.unlink(), False),
    "a link": (link, True),
}


@pytest.mark.parametrize("name", CASES)
def test_whoever_could_write_it_is_found(tmp_path: Path, name: str) -> None:
    for parent in (tmp_path, *list(tmp_path.parents)[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    path = tmp_path / "folder" / "allowed-domains.txt"
    path.parent.mkdir(mode=0o755)
    path.touch(mode=0o644)
    prepare, found = CASES[name]
    prepare(path)
    os.seteuid(WARDEN)
    try:
        told = writable_by(path, SESSION, SESSION)
    finally:
        os.seteuid(0)
    assert (told is not None) is found, told
