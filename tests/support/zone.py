"""What the lab's DNS knows: entries go in as plain data, answer sections come out as ready wire bytes.

A name that was never asked for costs one build by dnspython; every later answer to it is a dictionary look-up.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

OWNER = b"\xc0\x0c"  # compression pointer to the question's name (RFC 1035, 4.1.4)
NOERROR, SERVFAIL, NXDOMAIN, REFUSED = 0, 2, 3, 5
_LONGEST_CHAIN = 16
_ANY = 255


class Fault(StrEnum):
    """What the server does instead of answering properly."""

    NXDOMAIN = "nxdomain"
    NODATA = "nodata"
    SERVFAIL = "servfail"
    REFUSED = "refused"
    SILENT = "silent"
    TRUNCATED = "truncated"  # UDP: empty with TC; TCP: the answer
    TRUNCATED_DEAD = "truncated-dead"  # UDP: empty with TC; TCP: closed without an answer
    GARBAGE = "garbage"  # the right id, then bytes that are not DNS
    CUT = "cut"  # the last three bytes are missing
    WRONG_ID = "wrong-id"
    WRONG_QUESTION = "wrong-question"  # answers a question nobody asked
    SPOOFED = "spoofed"  # right in all but the source address


@dataclass(frozen=True, slots=True)
class Entry:
    """One owner name and how it is answered. `*.name` answers for every name below that has no entry of its own."""

    name: str
    records: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # type → data in zone file format
    ttl: int = 300  # seconds
    pick: int = 0  # each answer carries this many of the records, in rotation; 0: all of them
    fault: Fault | None = None
    fault_types: tuple[str, ...] = ()  # the types that the fault is for; empty: all
    delay: float = 0.0  # seconds before the answer leaves
    stray: tuple[tuple[str, str, str], ...] = ()  # (owner, type, data) that the answer carries besides

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        known = dict(data)
        known["fault"] = Fault(known["fault"]) if known.get("fault") else None
        known["records"] = {kind: tuple(values) for kind, values in known.get("records", {}).items()}
        known["fault_types"] = tuple(known.get("fault_types", ()))
        known["stray"] = tuple(tuple(item) for item in known.get("stray", ()))
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer without header and question. `answers` and `authority` are record counts in `body`."""

    rcode: int
    answers: int
    authority: int
    body: bytes
    fault: Fault | None = None
    delay: float = 0.0


class Zone:
    """All entries; names are compared without case."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._parents: set[str] = set()
        self._replies: dict[tuple[str, int], Reply] = {}
        self._turns: dict[tuple[str, int], int] = {}
        self._wire: dict[tuple[str, str, int], bytes] = {}

    def load(self, entries: Iterable[Entry]) -> None:
        """Add or replace entries, all of them or none; raises dns.exception.DNSException for unreadable data."""
        fresh = {entry.name.lower().rstrip("."): entry for entry in entries}
        for entry in fresh.values():
            for kind, values in entry.records.items():
                for value in values:
                    self._rdata(kind, value, entry.ttl)
        self._entries.update(fresh)
        self._index()

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._entries.pop(name.lower().rstrip("."), None)
        self._index()

    def clear(self) -> None:
        self._entries.clear()
        self._index()

    def find(self, name: str) -> Entry | None:
        """The entry for a name, or the closest wildcard above it."""
        entry = self._entries.get(name)
        rest = name
        while entry is None and "." in rest:
            rest = rest.partition(".")[2]
            entry = self._entries.get(f"*.{rest}")
        return entry

    def answer(self, name: str, kind: int) -> Reply:
        """What is answered for a lower-case name without trailing dot and a type number."""
        ready = self._replies.get((name, kind))
        if ready is None:
            ready, static = self._build(name, kind)
            if static:
                self._replies[name, kind] = ready
        return ready

    def _index(self) -> None:
        self._replies.clear()
        self._turns.clear()
        self._parents = {
            ".".join(labels[start:])
            for labels in (name.split(".") for name in self._entries)
            for start in range(1, len(labels))
        }

    def _build(self, name: str, kind: int) -> tuple[Reply, bool]:
        entry = self.find(name)
        if entry is None:
            rcode = NOERROR if name in self._parents else NXDOMAIN
            return Reply(rcode, 0, 1, _soa(name)), True
        fault = entry.fault
        if (
            fault
            and entry.fault_types
            and dns.rdatatype.to_text(dns.rdatatype.RdataType.make(kind)) not in entry.fault_types
        ):
            fault = None
        rcodes = {Fault.NXDOMAIN: NXDOMAIN, Fault.SERVFAIL: SERVFAIL, Fault.REFUSED: REFUSED, Fault.NODATA: NOERROR}
        if fault in rcodes:
            soa = fault in {Fault.NXDOMAIN, Fault.NODATA}
            return Reply(rcodes[fault], 0, int(soa), _soa(name) if soa else b"", None, entry.delay), True
        records, rcode, static = self._chain(name, kind)
        strays = [_wire_name(owner) + self._rdata(type_, data, entry.ttl) for owner, type_, data in entry.stray]
        if not records and not strays:
            return Reply(rcode, 0, 1, _soa(name), fault, entry.delay), static
        body = b"".join(records + strays)
        return Reply(rcode, len(records) + len(strays), 0, body, fault, entry.delay), static

    def _chain(self, name: str, kind: int) -> tuple[list[bytes], int, bool]:
        """Records from the asked name along its CNAMEs; the rcode of the last; whether it is always the same."""
        records: list[bytes] = []
        owner, owner_wire, static = name, OWNER, True
        for _ in range(_LONGEST_CHAIN):
            entry = self.find(owner)
            if entry is None:
                return records, NXDOMAIN if owner not in self._parents else NOERROR, static
            kinds = list(entry.records) if kind == _ANY else [dns.rdatatype.to_text(dns.rdatatype.RdataType.make(kind))]
            for type_ in kinds:
                values = entry.records.get(type_, ())
                if entry.pick and len(values) > entry.pick:
                    static = False
                    turn = self._turns.get((owner, kind), 0)
                    self._turns[owner, kind] = turn + entry.pick
                    values = tuple(values[(turn + i) % len(values)] for i in range(entry.pick))
                records += [owner_wire + self._rdata(type_, value, entry.ttl) for value in values]
            target = entry.records.get("CNAME", ())
            if not target or "CNAME" in kinds:
                break
            records.append(owner_wire + self._rdata("CNAME", target[0], entry.ttl))
            owner = target[0].lower().rstrip(".")
            owner_wire = _wire_name(owner)
        return records, NOERROR, static

    def _rdata(self, kind: str, value: str, ttl: int) -> bytes:
        """Everything of a record after its owner: type, class, TTL, length, data."""
        key = (kind, value, ttl)
        if key not in self._wire:
            number = dns.rdatatype.from_text(kind)
            data = dns.rdata.from_text(
                dns.rdataclass.IN, number, value, origin=dns.name.root, relativize=False
            ).to_wire()
            assert data is not None
            self._wire[key] = struct.pack("!HHIH", number, 1, ttl, len(data)) + data
        return self._wire[key]


def _wire_name(name: str) -> bytes:
    wire = dns.name.from_text(name).to_wire()
    assert wire is not None
    return wire


def _soa(name: str) -> bytes:
    """The SOA record of the asked name's last label, with a negative TTL of 60 s (RFC 2308)."""
    owner = _wire_name(name.rpartition(".")[2] or ".")
    data = _wire_name("ns.lab.invalid") + _wire_name("admin.lab.invalid") + struct.pack("!5I", 1, 3600, 600, 86400, 60)
    return owner + struct.pack("!HHIH", dns.rdatatype.SOA, 1, 60, len(data)) + data
