"""Runs: root, once, before anything else of the user's exists. The image's account follows CLAUDE_UID and CLAUDE_GID.

Only an image asks for this, by a file that names the account and the folders that belong to it; elsewhere nothing
happens. Needs CHOWN, not DAC_OVERRIDE: a folder is walked with the effective UID of its owner.
"""

# pathlib costs the small processes a megabyte, and has no dir_fd

from __future__ import annotations

import os
import stat

from initd import drop
from initd.errors import PrivilegeError
from initd.files import mount_points

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

MARK = "/usr/local/lib/initd/account"
PASSWD, GROUP = "/etc/passwd", "/etc/group"
MOUNTS = "/proc/self/mountinfo"
CAP_CHOWN = 0


def follow(uid: int, gid: int, *, mark: str = MARK, passwd: str = PASSWD, group: str = GROUP) -> None:
    """Make passwd, group and the account's folders say uid:gid. PrivilegeError (77) when that cannot be done."""
    try:
        with open(mark, encoding="utf-8") as file:
            name, *folders = file.read().split()
    except FileNotFoundError:
        return
    try:
        _rewrite(group, name, {2: str(gid)}, unless=str(gid))
        _rewrite(passwd, name, {2: str(uid), 3: str(gid)})
        mounts = mount_points(MOUNTS)  # what is mounted inside a folder belongs to somebody else
        for folder in folders:
            _hand_over(folder, (uid, gid), mounts)
    except OSError as error:
        raise PrivilegeError(
            f"{name} cannot become {uid}:{gid}: {error}",
            hint="it needs room on the disk and a root file system that is not read-only; or build the image with "
            "these numbers",
        ) from error


def _rewrite(path: str, name: str, fields: dict[int, str], *, unless: str | None = None) -> None:
    """Set colon-separated fields of `name`'s line, unless another line's third field says `unless` already."""
    with open(path, encoding="utf-8") as file:
        lines = [line.split(":") for line in file.read().splitlines()]
    fresh = [
        [fields.get(index, field) for index, field in enumerate(line)] if line[0] == name else line for line in lines
    ]
    if fresh == lines or any(unless == line[2] for line in lines):
        return
    part = f"{path}.initd"
    with open(part, "w", encoding="utf-8") as file:
        file.write("".join(":".join(line) + "\n" for line in fresh))
        os.fchmod(file.fileno(), 0o644)
    os.rename(part, path)


def _hand_over(folder: str, new: tuple[int, int], mounts: Collection[str]) -> None:
    """Whatever in `folder` has the owner that `folder` has gets the new one; the folder itself comes last."""
    with drop.as_owner(os.path.dirname(folder)):
        place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    info = os.fstat(place)
    if (info.st_uid, info.st_gid) != new:
        drop.need({CAP_CHOWN})
        permitted = drop.held()
        os.seteuid(info.st_uid)  # clears the effective set, capabilities(7): CHOWN is raised again
        try:
            drop.capset(permitted, effective=(CAP_CHOWN,), inheritable=())
            _walk(os.open(f"/proc/self/fd/{place}", os.O_RDONLY), folder, (info.st_uid, new, mounts))
        finally:
            os.seteuid(0)
            drop.capset(permitted, effective=permitted, inheritable=())
    os.close(place)


def _walk(here: int, path: str, rule: tuple[int, tuple[int, int], Collection[str]]) -> None:
    """Depth first, by descriptors, never through a symbolic link; closes `here`, which is `path`."""
    old, (uid, gid), mounts = rule
    try:
        for entry in os.listdir(here):
            info = os.stat(entry, dir_fd=here, follow_symlinks=False)
            if info.st_uid != old or f"{path}/{entry}" in mounts:
                continue
            if stat.S_ISDIR(info.st_mode):
                below = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
                _walk(below, f"{path}/{entry}", rule)
            else:
                os.chown(entry, uid, gid, dir_fd=here, follow_symlinks=False)
        os.fchown(here, uid, gid)
    finally:
        os.close(here)
