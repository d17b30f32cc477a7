"""Runs: warden, always. Points /etc/resolv.conf to the guard, remembers where it pointed before, puts it right again.

Written in place through a descriptor that the keeper opened as root: under Docker the file is a bind mount, which
cannot be renamed over. The original servers stay in it as comments, so that a warden that comes later, and `restore`,
find the file as it was. Format: resolv.conf(5).
"""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from initd.core.ruleset import Endpoint
from initd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from initd.core.ruleset import IPAddress

PATH = Path("/etc/resolv.conf")
LIMIT = 1 << 16
"""Bytes of the file that are looked at."""

OURS: tuple[IPAddress, ...] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))
_UNSPECIFIED: tuple[IPAddress, ...] = (IPv4Address(0), IPv6Address(0))  # for libc another word for 127.0.0.1

HEADER = "# initd: names resolve through its DNS guard, which asks the servers kept below\nnameserver 127.0.0.1\n"
KEPT = "#initd# "


def original(text: str) -> str:
    """The file as it was before `pointed`; any other text is returned as it is."""
    if HEADER not in text:
        return text
    lines = text.replace(HEADER, "").splitlines(keepends=True)
    return "".join(line.removeprefix(KEPT) for line in lines)


def pointed(text: str) -> str:
    """The original `text` with the guard as the only server; search, options and comments stay as they are."""
    lines = text.splitlines(keepends=True)
    return HEADER + "".join(KEPT + line if line.split()[:1] == ["nameserver"] else line for line in lines)


def servers(text: str) -> tuple[Endpoint, ...]:
    """The servers of an original `text`, in order; all of them, although libc stops at three.

    Left out: ourselves, and link-local ones with a zone, since a rule cannot name an interface by zone.
    """
    found: list[Endpoint] = []
    for line in text.splitlines():
        match line.split():
            case ["nameserver", word, *_]:
                address = _address(word)
                if address is not None and address not in OURS and address not in _UNSPECIFIED:
                    found.append(Endpoint(address))
    return tuple(dict.fromkeys(found))


def _address(text: str) -> IPAddress | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return None if isinstance(address, IPv6Address) and address.scope_id else address


class ResolvConf:
    """`descriptor` is open for reading and writing, or None: then the file is only read.

    `upstreams` are the servers that the file named when nobody had pointed it to us, or `saved` ones when it names
    none any more. Raises ConfigError (78) when there are neither.
    """

    def __init__(self, descriptor: int | None, *, saved: Iterable[str] = (), path: Path = PATH) -> None:
        self._descriptor = descriptor
        self._path = path
        self._original = original(self._read())
        found = servers(self._original)
        if not found:
            kept = [_address(text) for text in saved]
            found = tuple(Endpoint(address) for address in kept if address is not None and address not in OURS)
            self._original += "" if self._original.endswith("\n") else "\n"
            self._original += "".join(f"nameserver {endpoint.address}\n" for endpoint in found)
        if not found:
            raise ConfigError(
                f"{path} names no resolver that could be asked",
                hint="give the container one: `docker run --dns ADDRESS`, or `dns:` in compose.yaml",
            )
        self.upstreams = found

    @property
    def writable(self) -> bool:
        """Whether the file can be pointed to the guard at all."""
        return self._descriptor is not None

    def point_to_guard(self) -> None:
        """Make the guard the only server; raises OSError."""
        self._write(pointed(self._original))

    def check(self) -> None:
        """Put the file right if somebody else wrote it. Raises OSError.

        Servers that the new text names are `upstreams` from now on (an engine rewrites the file when networks change);
        one that names none is replaced by what we had.
        """
        text = self._read()
        if self._descriptor is None or text == pointed(self._original):
            return
        fresh = original(text)
        if found := servers(fresh):
            self._original, self.upstreams = fresh, found
        self.point_to_guard()

    def restore(self) -> None:
        """Write the original back; raises OSError."""
        self._write(self._original)

    def _read(self) -> str:
        if self._descriptor is not None:
            return os.pread(self._descriptor, LIMIT, 0).decode("utf-8", "surrogateescape")
        try:
            return self._path.read_bytes()[:LIMIT].decode("utf-8", "surrogateescape")
        except OSError:
            return ""

    def _write(self, text: str) -> None:
        if self._descriptor is None:
            return
        data = text.encode("utf-8", "surrogateescape")
        # Longer first, then cut: a reader in between never sees an empty file.
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))
