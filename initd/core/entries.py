"""What a policy is made of: frozen values, and the error that names every bad line.

`initd.core.policy` is the door; it exports everything here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Network, IPv6Network

from initd.errors import ConfigError

IPNetwork = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True, order=True)
class Service:
    """A transport protocol ("tcp" or "udp") and a destination port (1-65535)."""

    proto: str
    port: int


DEFAULT_SERVICES: frozenset[Service] = frozenset(Service("tcp", port) for port in (22, 80, 443))


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where an entry was written: 1-based line, its text without comment, and the preset it came through."""

    line: int
    text: str
    preset: str | None = None


@dataclass(frozen=True, slots=True)
class NameRule:
    """`name` in lower case A-label form without the trailing dot; a wildcard covers names below it only."""

    name: str
    wildcard: bool
    services: frozenset[Service]
    origin: Origin


@dataclass(frozen=True, slots=True)
class RangeRule:
    """A network, or a single address as /32 or /128."""

    network: IPNetwork
    services: frozenset[Service]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Denial:
    """`!name` or `!*.name`: never resolved, even if another line allows it. `!name` also covers names below it."""

    name: str
    wildcard: bool
    origin: Origin


class Feed(Enum):
    """Ranges that are only known at run time; the preset that asks for them has the same name."""

    GITHUB = "github"  # api.github.com/meta: web, api, git
    HOST = "host"  # the container's default gateways
    SUBNET = "subnet"  # the container's own directly connected networks


@dataclass(frozen=True, slots=True)
class FeedRule:
    """`services` of whatever networks the feed yields."""

    feed: Feed
    services: frozenset[Service]
    origin: Origin


class Verdict(Enum):
    """What the DNS guard and `fwctl test` make of a name."""

    LISTED = "listed"
    DENIED = "denied"  # an exception line says never
    PARENT = "parent"  # not listed, but something below it is: answer NOERROR/empty
    UNLISTED = "unlisted"


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on one name, the union of the services of every rule that matched, and the lines that decided."""

    verdict: Verdict
    services: frozenset[Service]
    origins: tuple[Origin, ...]
    literal: bool  # matched by its own name, not only by a wildcard


@dataclass(frozen=True, slots=True, order=True)
class Issue:
    """One bad line: 1-based line and column (in characters), why it is bad, and what to write instead."""

    file: str
    line: int
    column: int
    reason: str
    hint: str | None = None

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}: {self.reason}"
        return where if self.hint is None else f"{where}\nhint: {self.hint}"


SHOWN_ISSUES = 100
"""Issues in the text of one error; a file of the wrong kind has one on every line, and the first few say it all."""


class PolicyError(ConfigError):
    """A policy with at least one bad line. `issues` holds all of them in the order of the file."""

    def __init__(self, issues: tuple[Issue, ...]) -> None:
        self.issues = issues
        lines = [str(issue) for issue in issues[:SHOWN_ISSUES]]
        if len(issues) > SHOWN_ISSUES:
            lines.append(f"{issues[0].file}: and {len(issues) - SHOWN_ISSUES} more bad lines")
        super().__init__("\n".join(lines))
