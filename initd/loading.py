"""Runs: warden, at start and at reload. The policy file as it is on disk, and who could change it."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from initd.core import policy
from initd.files import mount_points, read_regular

if TYPE_CHECKING:
    from pathlib import Path

    from initd.core.policy import Lookup, Policy
    from initd.settings import Settings

DEFAULTS = "built-in defaults"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A policy, the text it was parsed from, and where that came from: the file's path, or `DEFAULTS`.

    `lookup` is made with it, because whoever parses a long policy does so away from the loop that answers DNS.
    """

    policy: Policy
    text: str
    source: str
    lookup: Lookup

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """PolicyError with every bad line, each naming `source`."""
        parsed = policy.parse(text, file=source)
        return cls(parsed, text, source, parsed.lookup())


def load_policy(settings: Settings) -> Loaded:
    """The policy file, or the defaults when there is none; ConfigError with every bad line otherwise."""
    path = settings.policy
    if not os.path.lexists(path):
        return Loaded.parse(policy.DEFAULT_POLICY, DEFAULTS)
    name = str(path)
    return Loaded.parse(policy.decode(read_regular(path, policy.MAX_BYTES), file=name), name)


def writable_by(path: Path, uid: int, gid: int) -> str | None:
    """How the user `uid`:`gid` (no other groups, no capabilities) could change the file at `path`; None when not.

    The file itself, or a directory on the way that lets it be replaced or renamed. A mount point cannot be renamed
    (rename(2), EBUSY), so the walk ends there: this is what makes the read-only mount of the compose file hold.

    Ask before the file is read: whoever can write it can also make it look as if nobody could, afterwards.
    """
    mounts = mount_points()
    found = True
    for place in (path, *path.parents):
        try:
            status = place.lstat()
            if stat.S_ISLNK(status.st_mode):
                return f"{place} is a symbolic link"
            read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        except OSError:  # missing, or in a directory that is closed to us: whose is that?
            found = False
            continue
        protected = found and status.st_mode & stat.S_ISVTX  # sticky: what is there and somebody else's, inode(7)
        if not read_only and (status.st_uid == uid or (not protected and _may_write(place, status, uid, gid))):
            return f"{place} is writable for UID {uid}"
        if str(place) in mounts:
            return None
        found = True
    return None


def _may_write(path: Path, status: os.stat_result, uid: int, gid: int) -> bool:
    """By the mode, or by a POSIX ACL that names the user or the group; its mask is not looked at.

    Layout of an ACL: linux/posix_acl_xattr.h, a version and then tag, permissions and ID of each entry.
    """
    if status.st_mode & (stat.S_IWGRP if status.st_gid == gid else stat.S_IWOTH):
        return True
    try:
        entries = os.getxattr(path, "system.posix_acl_access")[4:]
    except OSError:  # none, or a file system without
        return False
    return any(
        perm & 2 and (tag, number) in {(2, uid), (8, gid)} for tag, perm, number in struct.iter_unpack("<HHI", entries)
    )
