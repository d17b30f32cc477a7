"""Runs: PID 1, warden and `fwctl`, whenever an operator's file is read. Bounded reads that cannot hang. Stdlib only.

Symbolic links are followed: Kubernetes mounts a ConfigMap as links, and dotfile managers make them too.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

from initd.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_CHUNK = 1 << 16


class MissingFileError(ConfigError):
    """Nothing is there, not even a dangling link: the one failure that may mean "use the defaults"."""


def read_regular(path: Path, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes. Raises ConfigError that says what is in its place.

    O_NONBLOCK: opening a FIFO without a writer would otherwise wait for ever (fifo(7)).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not a path: {error}") from error
    except OSError as error:
        raise _open_error(path, error) from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{path} is {_kind(mode)}, not a regular file", hint=_replace(mode))
        return _read(fd, path, limit)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def mount_points(path: str = "/proc/self/mountinfo") -> frozenset[str]:
    """Where something is mounted in this namespace; a bind mount of the same file system shows nowhere else.

    Field 5 of /proc/self/mountinfo, with octal escapes for blank, tab, newline and backslash (proc(5)).
    """
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:  # noqa: PTH123
        fields = [line.split(" ", 5)[4] for line in lines]
    return frozenset(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field) for field in fields)


def _read(fd: int, path: Path, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := os.read(fd, _CHUNK):
        size += len(chunk)
        if size > limit:
            raise ConfigError(f"{path} is larger than {_size(limit)}", hint="is it the right file?")
        chunks.append(chunk)
    return b"".join(chunks)


def _open_error(path: Path, error: OSError) -> ConfigError:
    if isinstance(error, FileNotFoundError):
        if path.is_symlink():
            return ConfigError(
                f"{path} is a link to {path.readlink()}, which is not there",
                hint="mount what it points to as well, or put the file itself there",
            )
        return MissingFileError(f"{path} is not there", hint="create it, or correct the path")
    if isinstance(error, PermissionError):
        return ConfigError(
            f"{path} cannot be read by UID {os.geteuid()}: permission denied",
            hint=f"chmod a+r {path}, and a+x the directories above it",
        )
    return ConfigError(f"{path} cannot be opened: {error.strerror}", hint="put a regular file there")


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    )
    return next((name for test, name in kinds if test(mode)), "something else")


def _replace(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "put a file there; an engine makes a directory when the source of a bind mount is missing"
    return "put a regular file there"


def _size(limit: int) -> str:
    return f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit >> 10} KiB" if limit >= 1 << 10 else f"{limit} bytes"
