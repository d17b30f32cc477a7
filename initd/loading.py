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

    from initd.core.policy import Policy
    from initd.settings import Settings

DEFAULTS = "built-in defaults"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A policy, the text it was parsed from, and where that came from: the file's path, or `DEFAULTS`."""

    policy: Policy
    text: str
    source: str

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """PolicyError with every bad line, each naming `source`."""
        return cls(policy.parse(text, file=source), text, source)


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
    """
    mounts = mount_points()
    for place in (path, *path.parents):
        try:
            status = place.lstat()
        except FileNotFoundError:
            continue
        except OSError:
            return None  # a directory on the way is closed to us, and to a session more so
        if stat.S_ISLNK(status.st_mode):
            return f"{place} is a symbolic link"
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        if not read_only and _may_write(status, uid, gid):
            return f"{place} is writable for UID {uid}"
        if not read_only and not status.st_mode & stat.S_ISVTX and _listed_to_write(place, uid, gid):
            return f"{place} is writable for UID {uid} by its access control list"
        if str(place) in mounts:
            return None
    return None


def _may_write(status: os.stat_result, uid: int, gid: int) -> bool:
    """An owner may always chmod first; a sticky directory protects what belongs to somebody else (inode(7))."""
    if status.st_uid == uid:
        return True
    bit = stat.S_IWGRP if status.st_gid == gid else stat.S_IWOTH
    return bool(status.st_mode & bit) and not status.st_mode & stat.S_ISVTX


def _listed_to_write(path: Path, uid: int, gid: int) -> bool:
    """Whether a POSIX ACL names the user or the group with the write bit; its mask is not looked at.

    Layout: linux/posix_acl_xattr.h, a version and then tag, permissions and ID of each entry.
    """
    try:
        entries = os.getxattr(path, "system.posix_acl_access")[4:]
    except OSError:  # none, or a file system without
        return False
    return any(
        perm & 2 and (tag, number) in {(2, uid), (8, gid)} for tag, perm, number in struct.iter_unpack("<HHI", entries)
    )
