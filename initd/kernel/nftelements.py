"""Runs: warden. Set elements over netlink, packed by hand: a learned address may take 100 us, libnftables takes 5 ms.

Wire format: linux/netfilter/nf_tables.h, nfnetlink.h and net/netfilter/nfnetlink.c
(nfnetlink_rcv_batch). A batch is one transaction; keys of a concatenation are padded to four bytes a field.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, summarize_address_range
from typing import TYPE_CHECKING

from initd.core.ruleset import Element
from initd.errors import KernelError
from initd.kernel.libnftables import NETLINK_NETFILTER, error_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

TABLE = "initd"
PROTOCOLS: Mapping[str, int] = {"tcp": 6, "udp": 17}
_NAMES = {number: name for name, number in PROTOCOLS.items()}

GETTABLE, NEWSETELEM, GETSETELEM, DELSETELEM, GETOBJ = (0xA00 | number for number in (1, 12, 13, 14, 19))
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP, _CREATE = 0x1, 0x4, 0x300, 0x400
_NESTED = 0x8000
_DUMP_INTR = 0x10
_INET = 1  # NFPROTO_INET
_WAIT = struct.pack("qq", 5, 0)  # SO_RCVTIMEO: the kernel answers at once or not at all

Key = tuple[bytes, bytes]
"""First and last key of an interval, as the kernel compares them; both the same for a single value."""


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded to four bytes."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes of a message or of a nest, by kind without flags."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += max(length + 3 & ~3, 4)
    return found


def key_of(element: Element) -> Key:
    """An element as the pair of keys that the kernel holds for it."""
    network = element.network
    size = network.max_prefixlen // 8
    first = int(network.network_address)
    last = first | (1 << network.max_prefixlen - network.prefixlen) - 1
    tail = struct.pack(">B3xH2x", PROTOCOLS[element.proto], element.port)
    return first.to_bytes(size, "big") + tail, last.to_bytes(size, "big") + tail


def element_of(key: Key) -> Element | None:
    """The element of a pair of keys, None for one that we never write (no prefix, a range of ports)."""
    first, last = key
    if len(first) not in {12, 24} or len(last) != len(first) or first[-8:] != last[-8:]:
        return None
    size = len(first) - 8
    low, high = int.from_bytes(first[:size], "big"), int.from_bytes(last[:size], "big")
    host = low ^ high
    proto, port = struct.unpack(">B3xH2x", first[size:])
    if host & (host + 1) or low & host or proto not in _NAMES:
        return None
    family = IPv4Network if size == 4 else IPv6Network
    return Element(family((low, size * 8 - host.bit_length())), _NAMES[proto], port)


def set_of(element: Element, kind: str) -> str:
    """`initd4-learned` and the like."""
    return f"initd{element.network.version}-{kind}"


def _message(kind: int, flags: int, body: bytes, *, family: int = _INET, res_id: int = 0) -> bytes:
    """A netlink message with its nfgenmsg; `res_id` is in network order (only batch messages use it)."""
    return struct.pack("=IHHIIBBH", 20 + len(body), kind, flags, kind, 0, family, 0, res_id) + body


_BEGIN = _message(_BATCH_BEGIN, _REQUEST, b"", family=0, res_id=socket.htons(10))
_END = _message(_BATCH_END, _REQUEST, b"", family=0, res_id=socket.htons(10))
_LIST_HEAD = attribute(1, TABLE.encode() + b"\0")


def _item(element: Element, seconds: int | None) -> bytes:
    """NFTA_LIST_ELEM with the key and, unless None, NFTA_SET_ELEM_TIMEOUT in milliseconds."""
    key = attribute(1 | _NESTED, attribute(1, key_of(element)[0]))
    timeout = b"" if seconds is None else attribute(4, struct.pack(">Q", max(seconds, 1) * 1000))
    return attribute(1 | _NESTED, key + timeout)


def _lists(kind: int, flags: int, items: Mapping[str, Sequence[bytes]]) -> Iterator[bytes]:
    for name, packed in items.items():
        head = _LIST_HEAD + attribute(2, name.encode() + b"\0")
        yield _message(kind, _REQUEST | flags, head + attribute(3 | _NESTED, b"".join(packed)))


def _grouped(elements: Iterable[tuple[Element, int | None]]) -> dict[str, list[bytes]]:
    grouped: dict[str, list[bytes]] = {}
    for element, seconds in elements:
        grouped.setdefault(set_of(element, "learned"), []).append(_item(element, seconds))
    return grouped


def refreshing(elements: Mapping[Element, int]) -> list[bytes]:
    """Messages after which each element is there with exactly its time to live; at most 1,000 (16-bit lengths).

    Before 6.12 an add to an element that exists leaves its timeout alone, and deleting one that is missing fails the
    transaction (DESTROYSETELEM came with 6.3). Add, delete, add is right on all of them: the first add makes the
    delete succeed, and packets see the old element until the commit and the new one from then on.
    """
    items = _grouped(elements.items())
    keys = _grouped((element, None) for element in elements)
    add = list(_lists(NEWSETELEM, _CREATE, items))
    return [*add, *_lists(DELSETELEM, 0, keys), *add]


def removing(elements: Sequence[Element]) -> list[bytes]:
    """Messages after which none of the elements is there; the add keeps a missing one from failing the delete."""
    items = _grouped((element, 1) for element in elements)
    keys = _grouped((element, None) for element in elements)
    return [*_lists(NEWSETELEM, _CREATE, items), *_lists(DELSETELEM, 0, keys)]


class Channel:
    """One netlink socket; not shared between threads, opened on first use."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._sequence = 0

    def close(self) -> None:
        """Give the socket back; the next use opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _open(self) -> socket.socket:
        if self._socket is None:
            try:
                self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _WAIT)
                self._socket.bind((0, 0))
            except OSError as error:
                self.close()
                raise error_of(error.errno or errno.EIO, "no netlink socket for netfilter") from error
        return self._socket

    def _numbered(self, message: bytes, flags: int = 0) -> bytes:
        """`message` with the next sequence number and more flags."""
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        (old,) = struct.unpack_from("=H", message, 6)
        return message[:6] + struct.pack("=HI", old | flags, self._sequence) + message[12:]

    def transact(self, messages: Sequence[bytes]) -> int:
        """Commit `messages` as one transaction; 0 or the errno of the first that failed.

        The kernel judges the commit before it delivers the acknowledgement of the last message, so that one means
        committed (nfnetlink_rcv_batch). Raises OSError when the socket itself fails.
        """
        sock = self._open()
        first = self._sequence + 1
        parts = [self._numbered(message) for message in (_BEGIN, *messages[:-1])]
        parts.append(self._numbered(messages[-1], _ACK))
        last = self._sequence
        sock.send(b"".join([*parts, self._numbered(_END)]))
        failure = 0
        while True:
            data = sock.recv(65536)
            kind, _, sequence = struct.unpack_from("=HHI", data, 4)
            if kind != _ERROR or not first <= sequence <= self._sequence:
                continue  # left over from a transaction that timed out
            (code,) = struct.unpack_from("=i", data, 16)
            failure = failure or -code
            if sequence in {first, last}:  # the first one speaks for a commit that failed
                return failure

    def dump(self, kind: int, body: bytes, *, flags: int = _DUMP) -> Iterator[bytes]:
        """The answers' attributes. Nothing for a table or set that is not there; InitdError for the rest."""
        sock = self._open()
        sock.send(self._numbered(_message(kind, _REQUEST | flags, body)))
        while True:
            data = sock.recv(1 << 20)
            offset = 0
            while offset + 16 <= len(data):
                length, answer, answer_flags, sequence = struct.unpack_from("=IHHI", data, offset)
                if sequence == self._sequence:
                    if answer_flags & _DUMP_INTR:
                        raise InterruptedError
                    if answer in {_ERROR, _DONE}:
                        self._end(data, offset, length)
                        return
                    yield data[offset + 20 : offset + length]
                    if not flags & _DUMP:
                        return
                offset += max(length + 3 & ~3, 16)

    @staticmethod
    def _end(data: bytes, offset: int, length: int) -> None:
        code = -struct.unpack_from("=i", data, offset + 16)[0] if length >= 20 else 0
        if code and code != errno.ENOENT:
            raise error_of(code, "reading nf_tables")


def _dumped(kind: int, body: bytes, *, flags: int = _DUMP) -> list[bytes]:
    """A whole dump over a socket of its own, again when a commit cut it short."""
    for _ in range(20):
        channel = Channel()
        try:
            with contextlib.suppress(InterruptedError):
                return list(channel.dump(kind, body, flags=flags))
        except OSError as error:
            raise error_of(error.errno or errno.EIO, "reading nf_tables") from error
        finally:
            channel.close()
    raise KernelError("reading nf_tables: the ruleset changes faster than it can be read")


def _items(name: str) -> Iterator[dict[int, bytes]]:
    """Every element of one of our sets, as attributes."""
    for message in _dumped(GETSETELEM, _LIST_HEAD + attribute(2, name.encode() + b"\0")):
        data = attributes(message).get(3, b"")
        offset = 0
        while offset + 4 <= len(data):
            (length,) = struct.unpack_from("=H", data, offset)
            yield attributes(data[offset + 4 : offset + length])
            offset += max(length + 3 & ~3, 4)


def _value(data: bytes | None) -> bytes:
    return b"" if data is None else attributes(data).get(1, b"")


def held(name: str) -> set[Key]:
    """The keys that one of our interval sets holds; empty when there is no such set."""
    found: set[Key] = set()
    for item in _items(name):
        first = _value(item.get(1))
        found.add((first, _value(item.get(10)) or first))
    return found


def networks(name: str) -> tuple[str, ...]:
    """The ranges of one of our sets of plain intervals, sorted as text.

    Such a set holds edges: a start, and an end that carries NFT_SET_ELEM_INTERVAL_END and is one past the last
    address; an end may be missing where the next start or the end of the address space stands for it.
    """
    edges = sorted((_value(item.get(1)), not int.from_bytes(item.get(3, b""), "big") & 1) for item in _items(name))
    found: list[str] = []
    for index, (first, is_start) in enumerate(edges):
        if is_start:
            after = edges[index + 1][0] if index + 1 < len(edges) else b"\1" + bytes(len(first))
            low, past = int.from_bytes(first, "big"), int.from_bytes(after, "big")
            family = IPv4Address if len(first) == 4 else IPv6Address
            found += map(str, summarize_address_range(family(low), family(past - 1)))
    return tuple(sorted(found))


def remaining(name: str) -> dict[Element, int]:
    """The elements of a learned set with their remaining time, seconds, rounded up."""
    found: dict[Element, int] = {}
    for item in _items(name):
        key = _value(item.get(1))
        element = element_of((key, key))
        if element is not None:
            milliseconds = int.from_bytes(item.get(5, b""), "big")
            found[element] = -(-milliseconds // 1000)
    return found


def counters() -> dict[str, int]:
    """Packets of each named counter of ours (NFT_OBJECT_COUNTER)."""
    found: dict[str, int] = {}
    for message in _dumped(GETOBJ, _LIST_HEAD + attribute(3, struct.pack(">I", 1))):
        item = attributes(message)
        packets = attributes(item.get(4, b"")).get(2, b"")
        found[item.get(2, b"").rstrip(b"\0").decode()] = int.from_bytes(packets, "big")
    return found


def table_flags() -> int | None:
    """NFTA_TABLE_FLAGS of our table (1 is dormant: present, but not in force); None when there is none."""
    found = _dumped(GETTABLE, _LIST_HEAD, flags=0)
    return int.from_bytes(attributes(found[0]).get(2, b""), "big") if found else None
