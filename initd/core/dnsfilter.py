"""What the DNS guard makes of a name and of an answer; values in, values out.

Names are judged as text, but only when the wire form is unambiguous: a label that holds a dot, a NUL or anything else
outside letters, digits, hyphen and underscore is never a listed name.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, NamedTuple

from initd.core.leases import Held, Terms
from initd.core.policy import Decision, Verdict
from initd.core.special import SPECIAL4, SPECIAL6
from initd.core.wire import MAX_NAME, NOERROR, ROOT, TYPE_A, Answer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from initd.core.ruleset import IPAddress, IPNetwork

Decide = Callable[[str], Decision]

LOCALHOST: tuple[IPAddress, ...] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))

LOCAL_SUFFIXES = (".internal", ".local", ".lan", ".home.arpa")
"""Names that no public server answers for (RFC 6762, RFC 8375, ICANN's reserved .internal); so are single labels."""

LOCAL_TTL = 60
"""Seconds, for what is answered from /etc/hosts and the like."""

_NAME_BYTES = b"abcdefghijklmnopqrstuvwxyz0123456789-_."


def _bounds(networks: Iterable[IPNetwork]) -> tuple[list[bytes], list[bytes]]:
    ordered = sorted((one.network_address.packed, one.broadcast_address.packed) for one in networks)
    return [first for first, _ in ordered], [last for _, last in ordered]


_SPECIAL = {4: _bounds(SPECIAL4), 16: _bounds(SPECIAL6)}
_OUTSIDE: tuple[list[bytes], list[bytes]] = ([], [])
_PRIVATE = {
    4: _bounds(map(IPv4Network, ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16"))),
    16: _bounds([IPv6Network("fc00::/7")]),
}
_METADATA = {  # inside the private ranges, but the cloud's own: Alibaba's and Amazon's
    4: _bounds([IPv4Network("100.100.100.200/32")]),
    16: _bounds([IPv6Network("fd00:ec2::/32")]),
}


def _inside(address: bytes, ranges: Mapping[int, tuple[list[bytes], list[bytes]]]) -> bool:
    first, last = ranges.get(len(address), _OUTSIDE)
    index = bisect_right(first, address) - 1
    return index >= 0 and address <= last[index]


def _never(_: IPAddress) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """`local_names`: /etc/hosts, answered when listed. `own_names`: the box's own, answered always, opening nothing.

    `range_listed` says whether a special address lies in a range that the policy lists. Times are seconds, `cache`
    bytes, `concurrency` questions in flight, a quarter of them for literally listed names alone. With `audit` what is
    merely unlisted is asked upstream too, and opens nothing by that.
    """

    terms: Terms = field(default_factory=Terms)
    local_names: Mapping[str, tuple[IPAddress, ...]] = field(default_factory=dict)
    own_names: Mapping[str, tuple[IPAddress, ...]] = field(default_factory=dict)
    range_listed: Callable[[IPAddress], bool] = _never
    cache: int = 8 << 20
    concurrency: int = 256
    answer_within: float = 2.8
    audit: bool = False


class Fate(Enum):
    """What becomes of a question for a name."""

    FORWARD = "forward"  # A and AAAA go upstream, every other type is empty
    HOSTS = "hosts"  # listed, and /etc/hosts knows it
    OWN = "own"  # answered here, nothing is learned
    EMPTY = "empty"  # NOERROR without records: a parent of a listed name
    REFUSE = "refuse"  # NXDOMAIN


class Judged(NamedTuple):
    """`name` as text (escaped when it is no host name); `addresses` for HOSTS and OWN."""

    name: str
    fate: Fate
    decision: Decision
    addresses: tuple[IPAddress, ...] = ()

    def same_as(self, other: Judged) -> bool:
        """Whether an answer that was taken under `other` stands under this; the lines that decide may have moved."""
        return (self.fate, self.addresses, self.decision.services, self.decision.literal) == (
            (other.fate, other.addresses, other.decision.services, other.decision.literal)
        )

    def holding(self, addresses: tuple[IPAddress, ...]) -> Held:
        """What the name may open at `addresses`."""
        return Held(self.name, addresses, self.decision.services, self.decision.literal)


_UNLISTED = Decision(Verdict.UNLISTED, frozenset(), (), literal=False)


def judge(name: bytes, decide: Decide, options: GuardOptions) -> Judged:
    """The fate of wire-format `name` (lower case)."""
    if name == ROOT:
        # NXDOMAIN for the root would deny every name (RFC 8020).
        return Judged(".", Fate.EMPTY, _UNLISTED)
    text = name_text(name)
    if text is None:
        return Judged(escape(name), Fate.REFUSE, _UNLISTED)
    if text == "localhost" or text.endswith(".localhost"):
        return Judged(text, Fate.OWN, _UNLISTED, LOCALHOST)  # RFC 6761, 6.3
    if own := options.own_names.get(text):
        return Judged(text, Fate.OWN, _UNLISTED, own)
    decision = decide(text)
    if decision.verdict is Verdict.LISTED:
        if local := options.local_names.get(text):
            return Judged(text, Fate.HOSTS, decision, local)
        return Judged(text, Fate.FORWARD, decision)
    if options.audit and decision.verdict is not Verdict.DENIED:
        return Judged(text, Fate.FORWARD, decision)
    return Judged(text, Fate.EMPTY if decision.verdict is Verdict.PARENT else Fate.REFUSE, decision)


class Screened(NamedTuple):
    """`passed` go to the client, `learned` of them into the set, `stripped` nowhere."""

    passed: tuple[bytes, ...]
    learned: tuple[IPAddress, ...]
    stripped: tuple[IPAddress, ...]


def screen(addresses: Iterable[bytes], judged: Judged, options: GuardOptions) -> Screened:
    """Sort packed addresses; those in special ranges (`core.special`) pass only by one of these exceptions.

    A listed range holds it: it passes, and is reached through that range's own ports. The name is listed literally
    and is one that only the local network answers for: private ranges, never metadata. The name is in /etc/hosts:
    the same, and loopback passes without being learned.
    """
    hosts = judged.fate is Fate.HOSTS
    passed: list[bytes] = []
    learned: list[IPAddress] = []
    stripped: list[IPAddress] = []
    for packed in addresses:
        address: IPAddress = IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
        if learnable(packed, judged):
            passed.append(packed)
            learned.append(address)
        elif options.range_listed(address) or (hosts and address.is_loopback):
            passed.append(packed)
        else:
            stripped.append(address)
    return Screened(tuple(passed), tuple(learned), tuple(stripped))


def learnable(packed: bytes, judged: Judged) -> bool:
    """Whether a name with this judgement may open this address."""
    if not _inside(packed, _SPECIAL):
        return True
    name = judged.name
    literal_local = judged.decision.literal and ("." not in name or name.endswith(LOCAL_SUFFIXES))
    if literal_local or judged.fate is Fate.HOSTS:
        return _inside(packed, _PRIVATE) and not _inside(packed, _METADATA)
    return False


def name_text(name: bytes) -> str | None:
    """Wire-format `name` (lower case) as text without the final dot; None when it is no possible host name."""
    labels: list[bytes] = []
    position = 0
    while length := name[position]:
        labels.append(name[position + 1 : position + 1 + length])
        position += length + 1
    text = b".".join(labels)
    if text.count(b".") != len(labels) - 1 or text.translate(None, _NAME_BYTES):
        return None
    return text.decode("ascii")


def name_wire(text: str) -> bytes:
    """The wire form of `text` (lower-case A-labels). Raises ValueError when it has none."""
    labels = text.encode("ascii").split(b".")
    if not all(0 < len(label) < 64 for label in labels):
        raise ValueError(f"{text!r} is not a domain name")
    name = b"".join(bytes((len(label),)) + label for label in labels) + ROOT
    if len(name) > MAX_NAME:
        raise ValueError(f"{text!r} is longer than {MAX_NAME} bytes")
    return name


def escape(name: bytes) -> str:
    r"""Wire-format `name` for people and logs: printable, other bytes as \DDD (RFC 4343, 2.1)."""
    parts: list[str] = []
    position = 0
    while length := name[position]:
        label = name[position + 1 : position + 1 + length]
        parts.append("".join(chr(c) if 33 <= c < 127 and c not in b'.\\"' else f"\\{c:03d}" for c in label))
        position += length + 1
    return ".".join(parts) or "."


TYPE_NAMES = {
    1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 10: "NULL", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA", 33: "SRV",
    35: "NAPTR", 43: "DS", 48: "DNSKEY", 64: "SVCB", 65: "HTTPS", 252: "AXFR", 255: "ANY", 257: "CAA",
}  # fmt: skip


def type_name(qtype: int) -> str:
    """The mnemonic, or TYPE123 (RFC 3597, 5)."""
    return TYPE_NAMES.get(qtype, f"TYPE{qtype}")


def case_mask(name: bytes) -> int:
    """The bits of `name`, as a big-endian number, that turn letters to upper case (for 0x20 randomisation)."""
    mask = bytearray(len(name))
    position = 0
    while length := name[position]:
        for index in range(position + 1, position + 1 + length):
            mask[index] = 0x20 if 97 <= name[index] <= 122 else 0
        position += length + 1
    return int.from_bytes(mask)


def mix_case(name: bytes, mask: int, random: int) -> bytes:
    """`name` with the letters turned to upper case that `random` picks."""
    return (int.from_bytes(name) ^ (mask & random)).to_bytes(len(name))


def held_answer(addresses: Iterable[IPAddress], qtype: int, ttl: int) -> Answer:
    """An answer to A or AAAA out of addresses that we hold ourselves."""
    width = 4 if qtype == TYPE_A else 16
    found = tuple(one.packed for one in addresses if len(one.packed) == width)
    return Answer(NOERROR, truncated=False, chain=(), addresses=found, ttl=ttl, stray=0)
