"""DNS messages as bytes: scanned by offset, built by concatenation; nothing becomes an object that is not needed.

Names are wire-format bytes in lower case, the final zero included. Sources: RFC 1035 (messages, compression),
RFC 2181 (TTL, one CNAME an owner), RFC 2308 (negative answers), RFC 4343 (case), RFC 6891 (EDNS).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

TYPE_A, TYPE_CNAME, TYPE_SOA, TYPE_AAAA, TYPE_OPT = 1, 5, 6, 28, 41
CLASS_IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 2, 3, 4, 5, 16

MAX_TTL = 86400
"""Seconds; a longer TTL is cut to this, so that one answer does not open an address for weeks."""

UDP_SIZE = 1232
"""Largest UDP message sent or asked for: fits every path unfragmented (DNS flag day 2020)."""

PLAIN_SIZE = 512
"""Largest UDP message for a client without EDNS (RFC 1035, 4.2.1)."""

STREAM_SIZE = 65535
MAX_NAME = 255
MAX_LABEL = 63

ROOT = b"\0"
TO_QUESTION = b"\xc0\x0c"
"""Compression pointer to the question's name."""

_HEADER = struct.Struct("!HHHHHH")
_TYPE_CLASS = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")
_ANSWERED = struct.Struct("!HHHHH")

_QR, _OPCODE, _TC, _RD, _RA, _CD = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080, 0x0010
_DO = 0x8000

_OPT = b"\0\0\x29" + UDP_SIZE.to_bytes(2) + b"\0\0\0\0\0\0"
_OPT_DO = b"\0\0\x29" + UDP_SIZE.to_bytes(2) + b"\0\0\x80\0\0\0"
_OPT_BADVERS = b"\0\0\x29" + UDP_SIZE.to_bytes(2) + b"\x01\0\0\0\0\0"
_OPTS = (b"", _OPT, _OPT_DO)


class Malformed(ValueError):  # noqa: N818 - a word for the message, not for us
    """An answer that cannot be trusted in any part."""


class Rejected(ValueError):  # noqa: N818 - a word for the message, not for us
    """A query that is answered with `rcode` alone, or dropped when `rcode` is None. `end` is the question's end."""

    def __init__(self, rcode: int | None, *, end: int = 0) -> None:
        super().__init__(rcode)
        self.rcode = rcode
        self.end = end


class Query(NamedTuple):
    """A question of class IN. `end` is the offset behind it, `size` the largest UDP answer, `edns` 0, 1 or 2 (DO)."""

    flags: int
    name: bytes
    type: int
    end: int
    size: int
    edns: int


def scan_query(data: bytes) -> Query:
    """What a client asks. Raises Rejected for everything that is not one plain question of class IN.

    Bytes behind the records that the header counts are ignored: nothing of the client's message is passed on.
    """
    if len(data) < 12:
        raise Rejected(None)
    _, flags, questions, answers, authorities, additional = _HEADER.unpack_from(data)
    if flags & _QR:
        raise Rejected(None)  # answering an answer is how loops begin
    if flags & _OPCODE:
        raise Rejected(NOTIMP)
    if questions != 1 or answers or authorities:
        raise Rejected(FORMERR)
    try:
        position = 12
        while length := data[position]:
            if length > MAX_LABEL:
                raise Rejected(FORMERR)  # a question has nothing before it to point at
            position += length + 1
        position += 1
        qtype, qclass = _TYPE_CLASS.unpack_from(data, position)
    except (IndexError, struct.error):
        raise Rejected(FORMERR) from None
    end = position + 4
    if position - 12 > MAX_NAME:
        raise Rejected(FORMERR)
    size, edns = _scan_opt(data, end, additional) if additional else (PLAIN_SIZE, 0)
    if qclass != CLASS_IN:
        raise Rejected(NXDOMAIN, end=end)  # every client takes this as final, unlike NOTIMP and REFUSED
    return Query(flags, data[12:position].lower(), qtype, end, size, edns)


def _scan_opt(data: bytes, position: int, count: int) -> tuple[int, int]:
    """The EDNS size and 0 (no OPT), 1, or 2 (DO) from a query's additional records."""
    end, found = position, None
    try:
        for _ in range(count):
            owner = position
            position = skip_name(data, position)
            rtype, size, ttl, length = _RECORD.unpack_from(data, position)
            position += 10 + length
            if position > len(data):
                raise Rejected(FORMERR)
            if rtype == TYPE_OPT:
                if found is not None or data[owner]:
                    raise Rejected(FORMERR)  # RFC 6891, 6.1.1: one OPT, owned by the root
                found = size, ttl
    except (IndexError, struct.error, Malformed):
        raise Rejected(FORMERR) from None
    if found is None:
        return PLAIN_SIZE, 0
    size, ttl = found
    if ttl >> 16 & 0xFF:
        raise Rejected(BADVERS, end=end)
    return min(max(size, PLAIN_SIZE), UDP_SIZE), 2 if ttl & _DO else 1


def skip_name(data: bytes, position: int) -> int:
    """The offset behind the name at `position`. Raises Malformed or IndexError."""
    while length := data[position]:
        if length >= 0xC0:
            return position + 2
        if length > MAX_LABEL:
            raise Malformed("label type")
        position += length + 1
    return position + 1


def read_name(data: bytes, position: int) -> tuple[bytes, int]:
    """The name at `position`, decompressed, and the offset behind it. Raises Malformed or IndexError.

    A pointer must go backwards (RFC 1035, 4.1.4: "a prior occurrence"), so every name ends.
    """
    labels: list[bytes] = []
    size, behind, limit = 1, 0, position
    while length := data[position]:
        if length >= 0xC0:
            target = (length & 0x3F) << 8 | data[position + 1]
            behind = behind or position + 2
            if target >= limit:
                raise Malformed("compression pointer")
            position = limit = target
            continue
        if length > MAX_LABEL:
            raise Malformed("label type")
        size += length + 1
        if size > MAX_NAME:
            raise Malformed("name too long")
        labels.append(data[position : position + length + 1])
        position += length + 1
    return b"".join(labels).lower() + ROOT, behind or position + 1


class Answer(NamedTuple):
    """What an upstream said about one question.

    `chain` holds the CNAME targets in order, `addresses` the final RRset without duplicates, in 4 or 16 bytes each.
    `ttl` is the least of the records used, or of a negative answer (RFC 2308, 5); 0 means: not to be cached.
    `stray` counts address records that belong to no name of the chain.
    """

    rcode: int
    truncated: bool
    chain: tuple[bytes, ...]
    addresses: tuple[bytes, ...]
    ttl: int
    stray: int


def scan_answer(data: bytes, asked: bytes, *, longest_chain: int = 16) -> Answer | None:
    """Read the answer to `asked` (our query's bytes); None when it answers something else, to be waited past.

    Raises Malformed for one that does answer it and is broken. The question must be echoed byte for byte, in the
    case that was sent (draft-vixie-dnsext-dns0x20).
    """
    if len(data) < 12 or data[:2] != asked[:2]:
        return None
    _, flags, questions, *counts = _HEADER.unpack_from(data)
    if not flags & _QR or flags & _OPCODE:
        return None
    rcode, truncated = flags & 0xF, bool(flags & _TC)
    if questions == 0 and rcode in (FORMERR, NOTIMP, SERVFAIL, REFUSED):
        return Answer(rcode, truncated, (), (), 0, 0)  # servers that give up early echo nothing
    end = skip_name(asked, 12) + 4
    if questions != 1 or data[12:end] != asked[12:end]:
        return None
    if truncated or rcode not in (NOERROR, NXDOMAIN):
        return Answer(rcode, truncated, (), (), 0, 0)
    name, qtype = asked[12 : end - 4].lower(), int.from_bytes(asked[end - 4 : end - 2])
    try:
        return _scan_sections(data, end, counts, (name, qtype, longest_chain, rcode))
    except (IndexError, struct.error):
        raise Malformed("ends early") from None


def echoes(data: bytes, asked: bytes) -> bool:
    """True when `data` has our id and our question, but not in the case that we sent."""
    end = skip_name(asked, 12) + 4
    return data[:2] == asked[:2] and data[12:end] != asked[12:end] and data[12:end].lower() == asked[12:end].lower()


def _scan_sections(data: bytes, position: int, counts: list[int], question: tuple[bytes, int, int, int]) -> Answer:
    name, qtype, longest_chain, rcode = question
    width = 4 if qtype == TYPE_A else 16
    aliases: dict[bytes, tuple[bytes, int]] = {}
    hosts: dict[bytes, dict[bytes, int]] = {}
    total = 0
    for _ in range(counts[0]):
        if data[position : position + 2] == TO_QUESTION:
            owner, position = name, position + 2
        else:
            owner, position = read_name(data, position)
        rtype, rclass, ttl, length = _RECORD.unpack_from(data, position)
        position += 10
        if position + length > len(data):
            raise Malformed("record ends early")
        if rclass == CLASS_IN and rtype == qtype:
            if length != width:
                raise Malformed("address of the wrong length")
            hosts.setdefault(owner, {}).setdefault(data[position : position + length], _ttl(ttl))
            total += 1
        elif rclass == CLASS_IN and rtype == TYPE_CNAME:
            target, behind = read_name(data, position)
            if behind != position + length:
                raise Malformed("alias of the wrong length")
            aliases.setdefault(owner, (target, _ttl(ttl)))
        position += length
    chain: list[bytes] = []
    least, owner = MAX_TTL, name
    while owner not in hosts and owner in aliases:
        owner, ttl = aliases[owner]
        least = min(least, ttl)
        chain.append(owner)
        if len(chain) > longest_chain:
            raise Malformed("alias chain too long, or a loop")
    found = hosts.get(owner, {})
    negative = _scan_rest(data, position, counts[1], counts[2])
    least = min(least, *found.values()) if found else min(least, negative)
    return Answer(rcode, False, tuple(chain), tuple(found), least, total - len(found))


def _ttl(value: int) -> int:
    return 0 if value & 0x8000_0000 else min(value, MAX_TTL)  # RFC 2181, 8


def _scan_rest(data: bytes, position: int, authorities: int, additional: int) -> int:
    """The lesser of the first SOA's TTL and last field (RFC 2308, 5), 0 without one; Malformed when it ends early."""
    least = -1
    for index in range(authorities + additional):
        position = skip_name(data, position)
        rtype, rclass, ttl, length = _RECORD.unpack_from(data, position)
        position += 10 + length
        if position > len(data):
            raise Malformed("record ends early")
        if index < authorities and least < 0 and rtype == TYPE_SOA and rclass == CLASS_IN and length >= 22:
            least = min(_ttl(ttl), _ttl(int.from_bytes(data[position - 4 : position])))
    return max(least, 0)


def build_query(ident: int, name: bytes, qtype: int, *, edns: bool) -> bytes:
    """A query of our own, recursion desired; `name` may be in any case."""
    head = _HEADER.pack(ident, _RD, 1, 0, 0, 1 if edns else 0)
    return b"".join((head, name, _TYPE_CLASS.pack(qtype, CLASS_IN), _OPT if edns else b""))


class Reply:
    """A reply's records, ready to be joined to any question for the same name.

    Each record is (owner, type, class) and (length, data): the TTL, one for all, goes between. The first record's
    owner is the question's name; `aliases` of them, at the front, are CNAMEs.
    """

    __slots__ = ("_body", "_ttl", "aliases", "authority", "rcode", "records", "size")

    def __init__(
        self, rcode: int, records: tuple[tuple[bytes, bytes], ...] = (), *, aliases: int = 0, authority: bool = False
    ) -> None:
        self.rcode = rcode
        self.records = records
        self.aliases = aliases
        self.authority = authority
        self.size = sum(len(front) + len(back) + 4 for front, back in records)
        self._ttl = -1
        self._body = b""

    def addresses(self) -> tuple[bytes, ...]:
        """What an address reply says, packed; nothing for a negative one."""
        return () if self.authority else tuple(back[2:] for _, back in self.records[self.aliases :])

    def body(self, ttl: int) -> bytes:
        """All records with this TTL; kept, because a popular name is asked often within one second."""
        if ttl != self._ttl:
            self._body = _join(self.records, ttl)
            self._ttl = ttl
        return self._body


def _join(records: tuple[tuple[bytes, bytes], ...], ttl: int) -> bytes:
    seconds = ttl.to_bytes(4)
    return b"".join([front + seconds + back for front, back in records])


def address_reply(name: bytes, qtype: int, chain: tuple[bytes, ...], addresses: tuple[bytes, ...]) -> Reply:
    """NOERROR with the chain and the addresses behind it; both may be empty."""
    owner, offset = TO_QUESTION, 12 + len(name) + 4
    records: list[tuple[bytes, bytes]] = []
    for target in chain:
        records.append((owner + _TYPE_CLASS.pack(TYPE_CNAME, CLASS_IN), len(target).to_bytes(2) + target))
        offset += len(owner) + 10
        owner = (0xC000 | offset).to_bytes(2) if offset < 0x4000 else target
        offset += len(target)
    front = owner + _TYPE_CLASS.pack(qtype, CLASS_IN)
    records.extend((front, len(address).to_bytes(2) + address) for address in addresses)
    return Reply(NOERROR, tuple(records), aliases=len(chain))


def negative_reply(rcode: int) -> Reply:
    """NXDOMAIN or an empty NOERROR with an SOA of our own, so that caches know how long to believe it."""
    label = b"\x05initd\x00"
    data = label + label + struct.pack("!IIIII", 1, 3600, 600, 86400, NEGATIVE_TTL)
    record = ROOT + _TYPE_CLASS.pack(TYPE_SOA, CLASS_IN), len(data).to_bytes(2) + data
    return Reply(rcode, (record,), authority=True)


NEGATIVE_TTL = 2
"""Seconds that a cache may hold our own refusals: short, since a reload may list the name."""


def render(data: bytes, query: Query, reply: Reply, ttl: int, *, stream: bool = False) -> bytes:
    """`reply` as the answer to the client's message `data`, within what that client can take.

    Too large over UDP: a client with EDNS gets as much as fits and TC; one without gets an RRset that fits and no TC,
    because musl before 1.2.4 has no TCP to fall back on.
    """
    opt = _OPTS[query.edns]
    flags = _QR | _RA | query.flags & (_RD | _CD) | reply.rcode
    count, body = len(reply.records), reply.body(ttl)
    room = (STREAM_SIZE if stream else query.size) - query.end - len(opt)
    if len(body) > room:
        count, body = _fit(reply, ttl, room, flat=not query.edns and not stream)
        if query.edns or stream:
            flags |= _TC
    counts = (1, 0, count) if reply.authority else (1, count, 0)
    head = _ANSWERED.pack(flags, *counts, 1 if opt else 0)
    return b"".join((data[:2], head, data[12 : query.end], body, opt))


def _fit(reply: Reply, ttl: int, room: int, *, flat: bool) -> tuple[int, bytes]:
    """As many records as fit in `room`; with `flat` without the aliases, when no address would fit behind them."""
    records = reply.records
    if flat and sum(len(f) + len(b) + 4 for f, b in records[: reply.aliases + 1]) > room:
        records = tuple((TO_QUESTION + front[-4:], back) for front, back in records[reply.aliases :])
    fitting: list[tuple[bytes, bytes]] = []
    for front, back in records:
        room -= len(front) + len(back) + 4
        if room < 0:
            break
        fitting.append((front, back))
    return len(fitting), _join(tuple(fitting), ttl)


def render_rejection(data: bytes, rejected: Rejected) -> bytes | None:
    """The answer to a query that `scan_query` would not take; None when there is none to give."""
    if rejected.rcode is None:
        return None
    flags = int.from_bytes(data[2:4]) & (_OPCODE | _RD | _CD) | _QR | _RA | rejected.rcode & 0xF
    opt = _OPT_BADVERS if rejected.rcode == BADVERS else b""
    head = _ANSWERED.pack(flags, 1 if rejected.end else 0, 0, 0, 1 if opt else 0)
    return b"".join((data[:2], head, data[12 : rejected.end] if rejected.end else b"", opt))
