"""Who could change the policy file, compared with who really can: a process of that user tries."""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

from initd.loading import writable_by

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")

UID, GID, WARDEN = 64501, 64502, 64990
NOBODY = 0xFFFFFFFF
USER, GROUP = 0x02, 0x08  # ACL_USER, ACL_GROUP: linux/posix_acl.h


@pytest.fixture
def policy():
    with tempfile.TemporaryDirectory(prefix="initd-loading-") as name:  # pytest's own folders are closed to others
        Path(name).chmod(0o755)
        path = Path(name, "list", "allowed-domains.txt")
        path.parent.mkdir()
        path.parent.chmod(0o755)
        path.write_text("site.example\n")
        path.chmod(0o644)
        yield path


def allow(path: Path, tag: int, number: int, perm: int = 6) -> None:
    """One named entry beside owner, group, mask and others, as setfacl(1) writes it."""
    rest = 5 if path.is_dir() else 4
    entries = [(1, 7, NOBODY), (4, rest, NOBODY), (16, 7, NOBODY), (32, rest, NOBODY)]
    acl = b"".join(struct.pack("<HHI", *one) for one in sorted([*entries, (tag, perm, number)]))
    os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + acl)


def changes(path: Path) -> bool:
    """Whether a session of ours really can put another file in its place, or other text in it."""
    as_user = ["setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups", "--inh-caps=-all", "sh", "-c"]
    script = 'echo x >>"$1" || { echo x >"$1.new" && mv -f "$1.new" "$1"; }'
    return subprocess.run([*as_user, script, "sh", str(path)], stderr=subprocess.DEVNULL, check=False).returncode == 0


CASES = {
    "plain": (lambda path: None, False),
    "owner": (lambda path: os.chown(path, UID, 0), True),
    "group": (lambda path: (os.chown(path, 0, GID), path.chmod(0o664)), True),
    "others": (lambda path: path.chmod(0o646), True),
    "folder": (lambda path: path.parent.chmod(0o757), True),
    "sticky folder": (lambda path: path.parent.chmod(0o1757), False),
    "ACL for the user": (lambda path: allow(path, USER, UID), True),
    "ACL for the group": (lambda path: allow(path, GROUP, GID), True),
    "ACL for the user, to read": (lambda path: allow(path, USER, UID, 4), False),
    "ACL for somebody else": (lambda path: allow(path, USER, UID + 7), False),
    "ACL of the folder": (lambda path: allow(path.parent, USER, UID, 7), True),
}


def as_warden(path: Path) -> str | None:
    os.seteuid(WARDEN)
    try:
        return writable_by(path, UID, GID)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("case", CASES)
def test_it_says_what_is_so(policy: Path, case: str) -> None:
    prepare, writable = CASES[case]
    prepare(policy)
    assert (as_warden(policy) is not None) is writable
    assert changes(policy) is writable


def close(path: Path) -> None:
    os.chown(path.parent, UID, UID)
    path.parent.chmod(0)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


UNSEEN = {
    "in its own folder, which is closed now": (close, True),
    "in another user's folder, which is closed": (lambda path: path.parent.chmod(0), False),
    "missing in a sticky folder": (lambda path: (path.unlink(), path.parent.chmod(0o1777)), True),
    "missing in another user's folder": (lambda path: path.unlink(), False),
    "a link": (link, True),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_what_it_cannot_look_at_is_judged_by_the_folder(policy: Path, case: str) -> None:
    prepare, writable = UNSEEN[case]
    prepare(policy)
    assert (as_warden(policy) is not None) is writable
