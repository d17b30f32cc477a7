"""Runs: root, once, in a child of PID 1 that ends at once, so that reading settings costs PID 1 no memory.

What PID 1 has to know afterwards comes back as one JSON object; a failure as an exit code, after its line on stderr.
"""

from __future__ import annotations

import json
import os
import pwd
import sys

from initd import account, drop
from initd import settings as configuration
from initd.errors import ConfigError, InitdError, PrivilegeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from initd.settings import Settings

OWN = (65533, 65532, 65531)
"""UIDs of which PID 1 takes the first that is neither the session's nor the warden's: no account, no process has it."""


def run(out: int) -> NoReturn:
    """Prepare, answer on `out`, exit; never returns into the caller's code."""
    code = 0
    try:
        facts = prepare(configuration.load(os.environ))
        facts["environ"][configuration.READ_FROM] = str(configuration.settings_file(os.environ) or "")
        os.write(out, json.dumps(facts).encode())
    except InitdError as error:
        error.tell()
        code = error.code
    except BaseException:  # noqa: BLE001  # a forked child
        sys.excepthook(*sys.exc_info())
        code = InitdError.code
    os._exit(code)


def prepare(settings: Settings) -> dict[str, Any]:
    """Make both folders the warden's to write in, without CHOWN or DAC_OVERRIDE, and clear what a last run left."""
    drop.need(drop.KEEPER)  # first, so that what is missing is named, not what fails for want of it
    warden, gid = warden_account(settings)
    for folder in (settings.run_dir, settings.state_dir):
        _folder(str(folder), settings.warden_user, gid)
        if os.stat(folder).st_uid == settings.claude_uid:
            raise PrivilegeError(
                f"{folder} belongs to UID {settings.claude_uid}, and sessions must not write in it",
                hint=f"let root or {settings.warden_user!r} own it: a named volume, or chown on the host",
            )
    with drop.as_owner(str(settings.run_dir)):
        path = os.path.join(settings.run_dir, "ready")
        if os.path.lexists(path):  # `failed` stays until this start has succeeded: it is what sessions can read now
            os.unlink(path)
    account.follow(settings.claude_uid, settings.claude_gid)
    return {
        "environ": {**settings.environ()},
        "uid": settings.claude_uid,
        "gid": settings.claude_gid,
        "own": next(uid for uid in OWN if uid not in (settings.claude_uid, warden)),
        "grace": settings.stop_grace,
        "home": _home(settings.claude_uid),
    }


def warden_account(settings: Settings) -> tuple[int, int]:
    """UID and GID of `settings.warden_user`, a name or a number; ConfigError (78) when there is no such user.

    A number without an account gets the group of the same number.
    """
    user = settings.warden_user
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        if user.isdecimal():
            return int(user), int(user)
        raise ConfigError(
            f"there is no user {user!r} for the warden",
            hint=f"adduser --system --group {user}, or set INITD_WARDEN_USER",
        ) from None
    if entry.pw_uid in (0, settings.claude_uid):
        raise ConfigError(
            f"the warden's user {user!r} has UID {entry.pw_uid}",
            hint="it needs a UID of its own: neither root's nor CLAUDE_UID",
        )
    return entry.pw_uid, entry.pw_gid


def _folder(path: str, user: str, gid: int) -> None:
    """`path` exists and group `gid` may write in it. An owner may chgrp to a group it is in: no CHOWN needed."""
    own = os.getegid()
    if own != gid:
        drop.need({drop.CAP_SETGID})
    try:
        os.setegid(gid)
        os.makedirs(path, mode=0o755, exist_ok=True)
        with drop.as_owner(path):
            info = os.stat(path)
            if info.st_uid == os.geteuid() and (info.st_gid, info.st_mode & 0o7777) != (gid, 0o775):
                os.chown(path, -1, gid)
                os.chmod(path, 0o775)  # noqa: S103  # the group is the warden's
    except OSError as error:
        raise PrivilegeError(
            f"{path} cannot be made writable for {user!r}: {error.strerror}",
            hint=f"let root or {user!r} own it, or name another with INITD_RUN_DIR or INITD_STATE_DIR",
        ) from error
    finally:
        os.setegid(own)


def _home(uid: int) -> dict[str, str]:
    """HOME, USER and LOGNAME of the session user, or nothing when the UID has no name."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return {}
    return {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}
