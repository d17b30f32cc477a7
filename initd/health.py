"""Runs: warden, on request. Whether the box does its job, check by check, each with what was seen."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from typing import TYPE_CHECKING, Any

from initd.errors import InitdError
from initd.keeping import RECENT

if TYPE_CHECKING:
    from pathlib import Path

    from initd.keeping import Keeping
    from initd.live import Live
    from initd.settings import Settings

DISK_LIMIT = 0.9
"""Share of the workspace's file system in use from which the box counts as unhealthy."""

GUARD = ("127.0.0.1", 53)
GUARD_SECONDS = 2.0

QUERY = bytes.fromhex("1d1d01000001000000000000") + b"\x09localhost\x00" + bytes.fromhex("00010001")
"""A for localhost (RFC 6761): the guard answers it itself, and nobody's log or counters are spoilt."""


async def examine(settings: Settings, live: Live, keeping: Keeping) -> list[dict[str, Any]]:
    """All checks; none of them changes anything."""
    return [
        _check("ready", (settings.run_dir / "ready").exists(), "armed, and PID 1 has dropped its privileges"),
        await _rules(live),
        _mode(live),
        await _guard(),
        _keeper(keeping),
        _warden(keeping),
        workspace(settings),
        _disk(settings.workspace),
    ]


def _check(name: str, ok: object, detail: str) -> dict[str, Any]:
    return {"name": name, "ok": bool(ok), "detail": detail}


def _keeper(keeping: Keeping) -> dict[str, Any]:
    detail = "gone: nobody restarts the warden; restart the box" if keeping.lost else "restarts the warden when it ends"
    return _check("keeper", not keeping.lost, detail)


def _warden(keeping: Keeping) -> dict[str, Any]:
    now = time.monotonic()
    ends = keeping.recent_ends(now)
    detail = f"started {keeping.generation}x, ended {len(ends)}x in the last {RECENT / 60:.0f} minutes"
    return _check("warden", not keeping.looping(now), detail)


async def _rules(live: Live) -> dict[str, Any]:
    try:
        differs = await live.in_worker(live.parts.enforcer.recheck)
    except InitdError as error:
        differs = (error.message,)
    if differs:
        return _check("rules", False, "; ".join(differs))
    return _check("rules", True, f"the kernel holds what was written ({live.parts.backend.name})")


def _mode(live: Live) -> dict[str, Any]:
    """Audit mode was asked for, so it is no failure; but it must not pass for enforcement."""
    if live.auditing:
        return _check("mode", True, "AUDIT MODE: NOTHING IS ENFORCED, what is not listed is let through and recorded")
    return _check("mode", True, "enforcing")


async def _guard() -> dict[str, Any]:
    """A real query over the loopback, as a session sends it."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, GUARD)
            await loop.sock_sendall(sock, QUERY)
            async with asyncio.timeout(GUARD_SECONDS):
                answer = await loop.sock_recv(sock, 512)
        except (OSError, TimeoutError) as error:
            return _check("guard", False, f"the DNS guard does not answer: {error!r}")
    return _check("guard", answer[:2] == QUERY[:2], "the DNS guard answers")


def workspace(settings: Settings) -> dict[str, Any]:
    """Whether the session user may write where the work is; if not, what to set."""
    path = settings.workspace
    try:
        status = path.stat()
        read_only = os.statvfs(path).f_flag & os.ST_RDONLY
    except OSError as error:
        return _check("workspace", False, f"{path}: {error.strerror}")
    if status.st_uid == settings.claude_uid:
        bit = stat.S_IWUSR
    else:
        bit = stat.S_IWGRP if status.st_gid == settings.claude_gid else stat.S_IWOTH
    ok = stat.S_ISDIR(status.st_mode) and status.st_mode & bit and not read_only
    owner = f"{path} belongs to {status.st_uid}:{status.st_gid}, mode {stat.S_IMODE(status.st_mode):o}"
    if ok:
        return _check("workspace", ok, f"{owner}: writable for {settings.claude_uid}:{settings.claude_gid}")
    set_them = f"set CLAUDE_UID={status.st_uid} CLAUDE_GID={status.st_gid}"
    do = "mount it writable" if read_only else set_them if status.st_uid else "chown it on the host"
    words = f"NOT writable for {settings.claude_uid}:{settings.claude_gid}; {do}"
    return _check("workspace", ok, f"{owner}: {words}")


def _disk(path: Path) -> dict[str, Any]:
    try:
        space = os.statvfs(path)
    except OSError as error:
        return _check("disk", False, f"{path}: {error.strerror}")
    used = 1 - space.f_bavail / space.f_blocks if space.f_blocks else 0.0
    return _check("disk", used < DISK_LIMIT, f"{path}: {used:.0%} used, limit {DISK_LIMIT:.0%}")
