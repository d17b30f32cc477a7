"""One line of a policy: an entry, or the reason why not, with the likely intent as a hint.

Nothing here knows of files or of other lines. The grammar is documented in docs/policy.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import NamedTuple

from initd.core import ranges
from initd.core.entries import (
    DEFAULT_SERVICES,
    Denial,
    Feed,
    FeedRule,
    NameRule,
    Origin,
    RangeRule,
    Service,
)
from initd.core.names import MAX_NAME, NameFaultError, to_ascii
from initd.core.presets import PRESETS
from initd.core.suffixes import is_shared, is_top_level

Entry = NameRule | RangeRule | Denial | FeedRule

ONE_A_LINE = "write one entry a line"
URL = "a URL, not a name; paths and schemes cannot be listed"
OTHER_PROTOCOLS = ("dccp", "gre", "http", "https", "icmp", "quic", "sctp", "tls", "ws", "wss")
"""What people write for a protocol; a connection of these is TCP or UDP, or cannot be listed."""

_PROTO = re.compile(rf"/(tcp|udp|{'|'.join(OTHER_PROTOCOLS)})\Z", re.IGNORECASE)
_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//(?:[^/@]*@)?(\[[^\]]*\]|[^/:?]*)(?::([0-9]+))?")
_SERVICES = re.compile(r"[0-9,]*")
_BROKEN_URL = re.compile(r"(?:ftp|git|https?|ssh|wss?)(?::/|/+)([^/:?]+)", re.IGNORECASE)
_TWO_PROTOCOLS = re.compile(r"(?:tcp|udp)(?:[,/+].*)?", re.IGNORECASE)
_PORT_RANGE = re.compile(r"[0-9]+-[0-9]+")
_NOT_IPV6 = re.compile(r"[^0-9A-Fa-f:.%/]")


class FaultError(Exception):
    """A bad entry. `at` is the part of the text that the column points to, or its offset."""

    def __init__(self, reason: str, at: str | int = 0, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = at
        self.hint = hint

    def offset_in(self, entry: str) -> int:
        """Characters of `entry` before the bad part; 0 when the part is not there as it was written.

        What is missing at the end is pointed to by the last character.
        """
        return min(self.at, len(entry) - 1) if isinstance(self.at, int) else max(entry.find(self.at), 0)


class Target(NamedTuple):
    """An entry taken apart: what, and on which services (None: not said)."""

    host: str
    services: frozenset[Service] | None


def parse_entry(text: str, origin: Origin) -> tuple[Entry, ...]:
    """The rules that one entry stands for (several for a preset). Raises FaultError."""
    _check_shape(text)
    try:
        if text.startswith("!"):
            return (_denial(text[1:].lstrip(), origin),)
        if text.startswith("@"):
            return _preset(text, origin)
        return (_grant(text, origin),)
    except NameFaultError as error:
        raise FaultError(error.reason, error.fragment, error.hint) from error


def _check_shape(text: str) -> None:
    """What cannot be an entry at all, whatever it begins with."""
    invisible = next((character for character in text if not character.isprintable()), None)
    if invisible is not None and invisible != "\t":
        raise FaultError(f"invisible character U+{ord(invisible):04X}", invisible, "delete the line and type it again")
    if "://" in text or text.startswith("//"):
        raise _url_fault(text)
    if broken := _BROKEN_URL.match(text):  # https:/github.com, http//github.com
        raise FaultError(URL, "", f"did you mean {broken[1]}?")
    words = text.removeprefix("!").split()
    if len(words) > 1:
        if words[0].endswith(",") and not _SERVICES.fullmatch(words[1]):
            raise FaultError("a list of entries", words[0][-1], f"{ONE_A_LINE}, without commas")
        if any(word[0] in ":,/" or word[-1] in ":,/" for word in words):
            raise FaultError("space inside an entry", words[1], "write name:port or name:port,port without spaces")
        raise FaultError(f"{len(words)} entries on one line", words[1], ONE_A_LINE)
    before, _, after = text.rpartition(":")
    if "," in before or ("," in after and not _SERVICES.fullmatch(after.partition("/")[0])):
        raise FaultError("a list of entries", text.index(","), f"{ONE_A_LINE}, without commas")


def _url_fault(text: str) -> FaultError:
    match = _URL.search(text)
    host, port = (match[1], match[2]) if match else ("", None)
    hint = f"did you mean {host}{f':{port}' if port else ''}?" if host else "write the name alone"
    return FaultError(URL, "", hint)


def _denial(text: str, origin: Origin) -> Denial:
    host = text if text.count(":") > 1 else text.partition(":")[0]
    if not host:
        raise FaultError("a name is missing", 0, "write !name")
    preset = text.startswith("@")
    if preset or ranges.looks_like(host):
        what = "a preset" if preset else "an address or a range"
        hint = "list less instead: what is not listed is refused"
        raise FaultError(f"an exception is about a name, {text!r} is {what}", text, hint)
    if ":" in text or _PROTO.search(text):
        host = _PROTO.sub("", host)
        raise FaultError("an exception has no ports: the name is never resolved", text, f"write !{host}")
    if "/" in host:
        raise FaultError("a path cannot be listed, only a name", host[host.index("/") :], _meant(host, "!"))
    if host == "*":
        raise FaultError("'!*' would refuse everything", 0, "an empty file does that")
    name, wildcard = _name(host)
    return Denial(name=name, wildcard=wildcard, origin=origin)


def _preset(text: str, origin: Origin) -> tuple[Entry, ...]:
    host, services = _split(text)
    name = host.removeprefix("@").lower()
    preset = PRESETS.get(name)
    if preset is None:
        meant = TOOLS.get(name) or next(iter(get_close_matches(name, PRESETS, n=1, cutoff=0.7)), None)
        known = ", ".join(f"@{one}" for one in sorted(PRESETS))
        hint = f"did you mean @{meant}?" if meant else f"presets are {known}"
        raise FaultError(f"unknown preset {host!r}", host, hint)
    through = Origin(origin.line, origin.text, name)
    rules: list[Entry] = [_grant(entry, through) for entry in preset.entries]
    if preset.feed:
        rules.append(FeedRule(feed=Feed(name), services=DEFAULT_SERVICES, origin=through))
    if services is None:
        return tuple(rules)
    return tuple(replace(rule, services=services) for rule in rules if not isinstance(rule, Denial))


def _grant(text: str, origin: Origin) -> NameRule | RangeRule:
    host, services = _split(text)
    services = DEFAULT_SERVICES if services is None else services
    if ranges.looks_like(host):
        try:
            network = ranges.parse_range(host)
        except ranges.RangeFaultError as error:
            raise FaultError(error.reason, host, error.hint) from error
        return RangeRule(network=network, services=services, origin=origin)
    if "/" in host:
        raise FaultError("a path cannot be listed, only a name", host[host.index("/") :], _meant(host))
    if "@" in host:
        raise _user_fault(host)
    name, wildcard = _name(host)
    if wildcard and is_shared(name):
        hint = (
            "list the names below it that you need"
            if "." in name
            else "list the names that you need, or a wildcard on a name of its owner, as in *.example.org"
        )
        raise FaultError(f"{host!r} is a public suffix", host, hint)
    if not wildcard and is_top_level(name):
        raise FaultError(f"{host!r} is a public suffix", host, "list the names below it that you need")
    return NameRule(name=name, wildcard=wildcard, services=services, origin=origin)


def _meant(host: str, mark: str = "") -> str | None:
    name = host.partition("/")[0]
    return f"did you mean {mark}{name}?" if name else None


def _name(host: str) -> tuple[str, bool]:
    """The name in A-labels, and whether it was a wildcard."""
    rest = host.removeprefix("*.")
    wildcard = rest != host
    if "*" in rest:
        raise _wildcard_fault(host)
    if not rest.removesuffix("."):
        raise FaultError("a name is missing", host, None)
    if rest.startswith("."):
        plain = rest.strip(".")
        raise FaultError(f"{host!r} begins with a dot", host, f"did you mean *.{plain}?" if plain else None)
    name = to_ascii(rest)
    if wildcard and len(name) + 2 > MAX_NAME:
        raise FaultError("no name fits below this one", host)
    return name, wildcard


def _wildcard_fault(host: str) -> FaultError:
    if host == "*":
        return FaultError("'*' would list everything", host, "list the names that you need")
    tail = host.rpartition("*")[2].lstrip(".")
    plain = host.strip("*.")
    if tail and not host.rpartition("*")[0].strip("*."):
        hint = f"did you mean *.{plain}?" if "." in plain else "list the names that you need"
        return FaultError("a wildcard is exactly one '*.' before a name", host, hint)
    hint = f"did you mean *.{tail}?" if "." in tail else "list the names that you need"
    return FaultError(
        "'*' can only stand at the beginning, for everything below a name", host[host.rindex("*") :], hint
    )


# ---- host, ports and protocol


@dataclass(frozen=True, slots=True)
class _Parts:
    host: str
    ports: str | None
    proto: str | None
    at: int = 0  # where the ports begin


def _split(text: str) -> Target:
    parts = _take_apart(text)
    if parts.ports is None and parts.proto is None:
        return Target(parts.host, None)
    proto = "tcp" if parts.proto is None else parts.proto.lower()
    if proto in OTHER_PROTOCOLS:
        raise FaultError(f"{proto!r} cannot be listed", f"/{parts.proto}", "write /tcp or /udp, or nothing for tcp")
    if parts.ports is None:
        raise _port_missing(parts.host, parts.proto or proto)
    return Target(parts.host, frozenset(Service(proto, port) for port in _ports(parts)))


def _port_missing(host: str, proto: str) -> FaultError:
    port = 53 if proto.lower() == "udp" else 443
    return FaultError(f"/{proto} without a port", f"/{proto}", f"write the port too: {host}:{port}/{proto.lower()}")


def _take_apart(text: str) -> _Parts:
    rest, proto = text, None
    if match := _PROTO.search(text):
        rest, proto = text[: match.start()], match[1]
    if rest.startswith("["):
        inside, bracket, after = rest[1:].partition("]")
        if not bracket:
            raise FaultError("'[' without ']'", rest, f"did you mean [{rest[1:]}]?")
        if after.startswith("/"):
            prefix, _, ports = after.partition(":")
            hint = f"did you mean [{inside}{prefix}]{f':{ports}' if ports else ''}?"
            raise FaultError("the prefix length belongs inside the brackets", after, hint)
        if after and not after.startswith(":"):
            raise FaultError(f"{after!r} after the bracket", after, f"did you mean [{inside}]:{after.lstrip(':')}?")
        return _Parts(f"[{inside}]", after[1:] if after else None, proto, len(inside) + 3)
    if rest.count(":") > 1:
        if "::" not in rest and _NOT_IPV6.search(rest):
            raise FaultError("more than one ':'", rest.rindex(":"), "write several ports as name:443,8443")
        _refuse_bare_ipv6(rest, proto)
        return _Parts(rest, None, proto)
    host, colon, ports = rest.partition(":")
    if not host:
        raise FaultError("a name is missing", 0, "write name:port")
    if "/" in ports:
        raise _path_fault(host, ports)
    return _Parts(host, ports if colon else None, proto, len(host) + 1)


def _path_fault(host: str, ports: str) -> FaultError:
    port, _, tail = ports.partition("/")
    if tail.isdecimal() and ranges.looks_like(host):
        return FaultError("the prefix length stands before the port", f"/{tail}", f"did you mean {host}/{tail}:{port}?")
    if "@" in host:
        return _user_fault(host)
    if _TWO_PROTOCOLS.fullmatch(tail):
        return FaultError("one protocol a line", f"/{tail}", f"write two lines: {host}:{port} and {host}:{port}/udp")
    return FaultError("a path cannot be listed, only a name", f"/{tail}", f"did you mean {host}:{port}?")


def _user_fault(host: str) -> FaultError:
    return FaultError("a name has no user", 0, f"did you mean {host.rpartition('@')[2]}?")


def _refuse_bare_ipv6(text: str, proto: str | None) -> None:
    """`2001:db8::1:443` is an address and could be meant as a port: RFC 5952 section 6 asks for brackets."""
    address, _, last = text.rpartition(":")
    port_meant = last.isascii() and last.isdecimal() and len(last) <= 5 and ranges.is_ipv6(address)
    if port_meant and not (last == "0" or int(last) > 65535):
        if ranges.is_ipv6(text):
            hint = f"write [{address}]:{last} for the port, [{text}] for the address"
            raise FaultError(f"{text!r} is ambiguous: is {last} a port?", last, hint)
        raise FaultError("an IPv6 address with a port needs brackets", text, f"did you mean [{address}]:{last}?")
    if proto is not None and ranges.is_ipv6(text):
        raise _port_missing(f"[{text}]", proto)


def _ports(parts: _Parts) -> list[int]:
    host, ports, at = parts.host, parts.ports or "", parts.at
    if not ports:
        raise FaultError("the port is missing", at - 1, f"write {host}:443, or {host} for TCP 22, 80 and 443")
    numbers: list[int] = []
    for port in ports.split(","):
        numbers.append(_port(port, host, at))
        at += len(port) + 1
    return numbers


def _port(text: str, host: str, at: int) -> int:
    number = text.isascii() and text.isdecimal()
    if number and len(text) <= 5 and 0 < int(text) <= 65535:
        return int(text)
    if number:
        raise FaultError(f"port {text[:12]} is not between 1 and 65535", at)
    if "@" in f"{host[1:]}{text}":
        raise _user_fault(f"{host}:{text}" if "@" in text else host)
    if not text:
        raise FaultError("a port is missing beside a comma", at, f"write {host}:80,443")
    if _PORT_RANGE.fullmatch(text):
        raise FaultError("a range of ports cannot be listed", at, f"list each port: {host}:{text.replace('-', ',')}")
    if text == "*":
        raise FaultError("'*' cannot stand for ports", at, "list each port that you need")
    if text.lower() in SERVICE_PORTS:
        raise FaultError(f"{text!r} is not a port", at, f"did you mean {host}:{SERVICE_PORTS[text.lower()]}?")
    meant = f"did you mean {text}?" if host.lower() in SERVICE_PORTS else f"write a number, as in {host}:443"
    raise FaultError(f"{text[:40]!r} is not a port", at, meant)


TOOLS = {
    "apt": "debian",
    "claude": "anthropic",
    "git": "github",
    "node": "npm",
    "pip": "pypi",
    "python": "pypi",
    "yarn": "npm",
}
"""Tools that people write for presets; only for hints."""

SERVICE_PORTS = {
    "domain": 53,
    "ftp": 21,
    "http": 80,
    "https": 443,
    "mysql": 3306,
    "postgres": 5432,
    "postgresql": 5432,
    "redis": 6379,
    "smtp": 25,
    "ssh": 22,
}
"""Names that people write for ports; only for hints."""
