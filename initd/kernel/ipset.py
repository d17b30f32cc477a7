"""Runs: warden. Sets of addresses: their lives through pyroute2, their elements as packed netlink messages.

One message carries as many elements as fit (IPSET_ATTR_ADT, net/netfilter/ipset/ip_set_core.c), about 4 µs each
where a call for each costs 176. A set is loaded under another name and swapped in, so an element that stays is never
missing; a learned set is created once and never swapped for an empty one. Layout: uapi/linux/netfilter/ipset/ip_set.h.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Any, Self

from initd.core.ruleset import Element
from initd.errors import KernelError, PrivilegeError
from initd.kernel.netlink import NESTED, NETFILTER, NETWORK_ORDER, Netlink, NetlinkRefusal, attribute, attributes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_SUBSYSTEM = 6 << 8  # NFNL_SUBSYS_IPSET
_LIST, _ADD, _DEL = _SUBSYSTEM | 7, _SUBSYSTEM | 9, _SUBSYSTEM | 10
_PROTOCOL, _SETNAME, _TYPENAME, _DATA, _ADT, _LINENO = 1, 2, 3, 7, 8, 9
_IP, _CIDR, _PORT, _TIMEOUT, _PROTO = 1, 3, 4, 6, 7
_MAXELEM = 19
_FLAGS, _HEADER_ONLY = 6, 4  # IPSET_FLAG_LIST_HEADER

_CHUNK = 60_000
"""Bytes of elements in one message; a netlink attribute holds at most 65,535."""

_MAX_TIMEOUT = 2_147_483  # IPSET_MAX_TIMEOUT, seconds; 0 would mean for ever
LEARNED_TIMEOUT = 300
"""Seconds, only a default: every learned element brings its own."""

_PROTO_NUMBER = {"tcp": 6, "udp": 17}
_PROTO_NAME = {number: name for name, number in _PROTO_NUMBER.items()}
_NFGEN = {4: struct.pack("=BBH", AF_INET, 0, 0), 6: struct.pack("=BBH", AF_INET6, 0, 0)}

# DATA{IP{address} CIDR}, the part of an element that its network decides; the total length is patched in by addition.
_HEAD = {4: struct.Struct("=HHHHHH4sHHB3x"), 6: struct.Struct("=HHHHHH16sHHB3x")}
_HOST = {4: struct.Struct("=HHHHHH4s"), 6: struct.Struct("=HHHHHH16s")}

ANY = "any"
"""`Element.proto` in a set without ports (special ranges); the port is 0."""

_WORDS = {
    errno.EPERM: "not permitted",
    errno.ENOENT: "the set does not exist",
    errno.EEXIST: "a set of that name and another kind exists",
    4097: "protocol error",
    4098: "the kernel has no such set type",
    4099: "the kernel's limit of sets is reached",
    4100: "the set is in use",
    4102: "the sets differ in type",
    4103: "the element exists",
    4104: "a prefix length of 0 cannot be stored",
    4109: "not an IPv4 address",
    4110: "not an IPv6 address",
    4352: "the set is full",
}
_NO_SET, _EXISTS, _NO_SECOND, _MISMATCH = errno.ENOENT, errno.EEXIST, 4101, 4102


@dataclass(frozen=True, slots=True)
class SetSpec:
    """What a set is: `kind` as ipset(8) names it, `version` 4 or 6, `timeout` in seconds for one whose elements age."""

    name: str
    kind: str
    version: int
    maxelem: int = 65_536
    timeout: int | None = None

    def renamed(self, name: str) -> SetSpec:
        """The same set under another name."""
        return SetSpec(name, self.kind, self.version, self.maxelem, self.timeout)


def room(elements: int) -> int:
    """The smallest power of two above `elements`, at least 65,536."""
    return max(65_536, 1 << elements.bit_length())


def trouble(code: int, doing: str) -> KernelError | PrivilegeError:
    """The error for netlink or ipset error number `code` while `doing` something."""
    if code == errno.EPERM:
        return PrivilegeError(f"ipset: {doing}: not permitted", hint="grant the container NET_ADMIN (cap_add)")
    if code == errno.EINVAL:
        return KernelError(
            f"ipset: {doing}: the kernel has no ip_set",
            hint="load ip_set on the host: modprobe ip_set, or use nftables",
        )
    text = _WORDS.get(code) or (errno.errorcode.get(code) or f"error {code}")
    return KernelError(f"ipset: {doing}: {text}")


class SetWriter:
    """Creates, fills, swaps and destroys sets. For one thread, for the length of one `with`."""

    def __enter__(self) -> Self:
        # Imported here: 150 ms that a reader or a learner need not pay. Opened for each use: a pyroute2 object
        # belongs to the thread and event loop that made it.
        from pyroute2 import IPSet  # noqa: PLC0415
        from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

        self._error: type[Any] = NetlinkError
        try:
            self._sets = IPSet()
        except NetlinkError as error:
            raise trouble(error.code, "opening") from error
        except OSError as error:
            raise KernelError(f"ipset: no netlink socket: {error.strerror or error}") from error
        try:
            self._raw = Netlink(NETFILTER)
        except BaseException:
            self._sets.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._sets.close()
        self._raw.close()

    def load(self, spec: SetSpec, elements: Iterable[Element], *, timeout: int = 0) -> bool:
        """Make the set hold exactly `elements`, in one step for whoever looks at it; `timeout` in seconds, 0 for ever.

        False when a set of that name but of another type stands in the way. Raises KernelError.
        """
        packed = [pack(element, timeout=timeout or None, ports=spec.kind != "hash:net") for element in elements]
        return self._install(spec, packed)

    def _install(self, spec: SetSpec, packed: list[bytes]) -> bool:
        fresh = spec.renamed(f"{spec.name}.new")
        self.destroy(fresh.name)
        self.create(fresh, hashsize=max(64, len(packed)))
        try:
            send(self._raw, _ADD, fresh, packed)
            code = self._try("swap", fresh.name, spec.name)
            if code == _NO_SECOND:
                code = self._try("rename", fresh.name, spec.name)
            if code and code != _MISMATCH:
                raise trouble(code, f"putting {spec.name} in place")
        finally:
            self.destroy(fresh.name)
        return code == 0

    def ensure_learned(self, spec: SetSpec) -> bool:
        """Make the set exist as `spec` says, keeping what it holds. False as in `load`."""
        code = self._try("create", spec.name, **self._shape(spec), exclusive=False)
        if code == 0:
            return True
        if code != _EXISTS:
            raise trouble(code, f"creating {spec.name}")
        held = [
            pack(element, timeout=left, host=True)
            for element, left in read(self._raw, spec.name)
            if left and element.proto in _PROTO_NUMBER and element.network.num_addresses == 1
        ]
        return self._install(spec, held[: spec.maxelem])

    def create(self, spec: SetSpec, *, hashsize: int = 64) -> None:
        """A new, empty set. Raises KernelError, also when the name is taken."""
        code = self._try("create", spec.name, **self._shape(spec), hashsize=hashsize)
        if code:
            raise trouble(code, f"creating {spec.name} ({spec.kind})")

    def destroy(self, name: str) -> bool:
        """Remove a set; False when it is in use, True also when it never was."""
        code = self._try("destroy", name)
        if code in {0, _NO_SET}:
            return True
        if code == 4100:
            return False
        raise trouble(code, f"destroying {name}")

    def _shape(self, spec: SetSpec) -> dict[str, Any]:
        family = AF_INET if spec.version == 4 else AF_INET6
        return {"stype": spec.kind, "family": family, "maxelem": spec.maxelem, "timeout": spec.timeout}

    def _try(self, verb: str, *names: str, **options: Any) -> int:
        try:
            getattr(self._sets, verb)(*names, **options)
        except self._error as error:
            return int(error.code)
        return 0


class Learner:
    """Inserts and deletes single elements on a socket of its own: the hot path, about 30 µs a call."""

    def __init__(self, specs: Mapping[int, SetSpec]) -> None:
        self._specs = specs
        self._socket: Netlink | None = None

    def add(self, elements: Iterable[tuple[Element, int]]) -> None:
        """Insert or refresh; all acknowledged on return. Raises KernelError when even one was not inserted."""
        packed: dict[int, list[bytes]] = {}
        for element, timeout in elements:
            packed.setdefault(element.network.version, []).append(pack(element, timeout=timeout, host=True))
        self._send(_ADD, packed)

    def remove(self, elements: Iterable[Element]) -> None:
        """Delete; one that is not there is not an error."""
        packed: dict[int, list[bytes]] = {}
        for element in elements:
            packed.setdefault(element.network.version, []).append(pack(element, host=True))
        self._send(_DEL, packed)

    def close(self) -> None:
        """Give the socket back."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, verb: int, packed: dict[int, list[bytes]]) -> None:
        if self._socket is None:
            self._socket = Netlink(NETFILTER)
        try:
            for version, elements in packed.items():
                send(self._socket, verb, self._specs[version], elements)
        except KernelError:
            self.close()  # an answer that comes late must not be taken for that of the next request
            raise


def send(link: Netlink, verb: int, spec: SetSpec, packed: list[bytes]) -> None:
    """Apply one verb to all elements, as few messages as possible, each acknowledged. Raises KernelError.

    Without NLM_F_EXCL this is ipset's -exist: adding refreshes the time-out, deleting what is not there succeeds.
    """
    start = _NFGEN[spec.version] + attribute(_PROTOCOL, b"\6") + attribute(_SETNAME, spec.name.encode() + b"\0")
    line = attribute(_LINENO, b"\0\0\0\0")  # demanded beside ADT; 0 makes the kernel answer with a plain error
    step = _CHUNK // max(map(len, packed), default=1)
    for first in range(0, len(packed), step):
        body = b"".join(packed[first : first + step])
        try:
            link.request(verb, start + attribute(_ADT | NESTED, body) + line)
        except NetlinkRefusal as refusal:
            doing = f"{'adding to' if verb == _ADD else 'deleting from'} {spec.name}"
            raise trouble(refusal.code, doing) from refusal


def pack(element: Element, *, timeout: int | None = None, ports: bool = True, host: bool = False) -> bytes:
    """One DATA attribute. `host` leaves the prefix length out, for sets of single addresses."""
    network, proto, port = element
    version = network.version
    width = 4 if version == 4 else 16
    tail = _tail(proto, port) if ports else b""
    if timeout is not None:
        tail += struct.pack("=HH", 8, _TIMEOUT | NETWORK_ORDER) + struct.pack(">I", min(max(timeout, 1), _MAX_TIMEOUT))
    address = network.network_address.packed
    start = (_DATA | NESTED, 8 + width, _IP | NESTED, 4 + width, (1 if version == 4 else 2) | NETWORK_ORDER, address)
    if host:
        return _HOST[version].pack(12 + width + len(tail), *start) + tail
    return _HEAD[version].pack(20 + width + len(tail), *start, 5, _CIDR, network.prefixlen) + tail


_tails: dict[tuple[str, int], bytes] = {}


def _tail(proto: str, port: int) -> bytes:
    known = _tails.get((proto, port))
    if known is None:
        known = attribute(_PORT | NETWORK_ORDER, struct.pack(">H", port))
        known += attribute(_PROTO, bytes([_PROTO_NUMBER[proto]]))
        _tails[proto, port] = known
    return known


def read(link: Netlink, name: str) -> Iterator[tuple[Element, int]]:
    """(element, seconds left or 0) of a set, straight from a dump; NetlinkRefusal ENOENT when there is no such set.

    Shares only the framing with the writer: what was written is found again by walking what the kernel says.
    """
    networks: dict[bytes, IPv4Network | IPv6Network] = {}
    body = _NFGEN[4] + attribute(_PROTOCOL, b"\6") + attribute(_SETNAME, name.encode() + b"\0")
    for payload in link.dump(_LIST, body):
        for kind, start, end in attributes(payload, 4):
            if kind == _ADT:
                for _, first, last in attributes(payload, start, end):
                    yield _element(payload[first:last], networks)


def _element(data: bytes, networks: dict[bytes, IPv4Network | IPv6Network]) -> tuple[Element, int]:
    address, prefix, proto, port, left = b"", -1, ANY, 0, 0
    for kind, start, end in attributes(data):
        if kind == _IP:
            address = data[start + 4 : end]
        elif kind == _CIDR:
            prefix = data[start]
        elif kind == _PORT:
            port = data[start] << 8 | data[start + 1]
        elif kind == _PROTO:
            number = data[start]
            proto = _PROTO_NAME.get(number) or str(number)
        elif kind == _TIMEOUT:
            left = int.from_bytes(data[start:end], "big")
    key = address + bytes([prefix & 0xFF])
    network = networks.get(key)
    if network is None:
        number = int.from_bytes(address, "big")
        if len(address) == 4:
            network = IPv4Network((number, 32 if prefix < 0 else prefix))
        else:
            network = IPv6Network((number, 128 if prefix < 0 else prefix))
        networks[key] = network
    return Element(network, proto, port), left


def kind_of(link: Netlink, name: str) -> tuple[str, int] | None:
    """(type, maxelem) of a set as it stands, None when there is none."""
    body = _NFGEN[4] + attribute(_PROTOCOL, b"\6") + attribute(_SETNAME, name.encode() + b"\0")
    body += attribute(_FLAGS | NETWORK_ORDER, struct.pack(">I", _HEADER_ONLY))
    kind, size = "", 0
    try:
        for payload in link.dump(_LIST, body):
            for key, start, end in attributes(payload, 4):
                if key == _TYPENAME:
                    kind = payload[start:end].rstrip(b"\0").decode()
                elif key == _DATA:
                    for inner, first, last in attributes(payload, start, end):
                        if inner == _MAXELEM:
                            size = int.from_bytes(payload[first:last], "big")
    except NetlinkRefusal as refusal:
        if refusal.code == _NO_SET:
            return None
        raise trouble(refusal.code, f"reading {name}") from refusal
    return kind, size
