"""Two namespaces and the cable between them: a box, and a far side that owns every address and answers on every port.

Each step runs in a child of its own (`Wire.do`): python-iptables keeps its tables for a whole process, and a namespace
is entered for good. Nothing leaves the far side; it has no other interface.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import time
import traceback
from dataclasses import dataclass

BOX4, FAR4 = "198.51.100.2", "198.51.100.1"
BOX6, FAR6 = "2001:db8:1::2", "2001:db8:1::1"
SUBNET4, SUBNET6 = "198.51.100.0/24", "2001:db8:1::/64"
# All of it is local on the far side (AnyIP): what a box must not reach answers too, so that a leak is seen.
OWNED = (
    "203.0.113.0/24", "192.0.2.0/24", "2001:db8:2::/48", "169.254.0.0/16", "10.0.0.0/8", "192.168.0.0/16",
    "172.16.0.0/12", "100.64.0.0/10", "198.18.0.0/15", "fd00::/8", "64:ff9b::/96", "2002::/16",
)  # fmt: skip
PORTS = (22, 53, 80, 443, 8443)
REFUSED = frozenset({"ECONNREFUSED", "EHOSTUNREACH", "EPERM", "EACCES"})
WARDEN = 990
AT_ONCE = 50.0 if os.environ.get("INITD_VM") else 5.0  # milliseconds; tests/vm emulates every instruction
SESSION = 1501

_numbers = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)


def run(*argv: str, text: str | None = None, check: bool = True) -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def enter(name: str) -> None:
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    if _libc.setns(descriptor, 0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "setns")
    os.close(descriptor)


@dataclass(frozen=True)
class Attempt:
    """What became of one attempt: "open", an errno's name or "timeout", after how many milliseconds."""

    target: tuple
    outcome: str
    ms: float

    @property
    def refused_at_once(self) -> bool:
        return self.outcome in REFUSED and self.ms < AT_ONCE


@contextlib.contextmanager
def as_user(uid: int):
    """Sockets made inside belong to `uid` (xt_owner and skuid look at the creator's fsuid)."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def attempt(kind: str, address: str, port: int = 443, *, uid: int = SESSION, timeout: float = 5.0) -> Attempt:
    """`kind` is tcp, udp or icmp. The best of up to ten refusals: other processes share these two cores."""
    tries = [_attempt(kind, address, port, uid, timeout)]
    while len(tries) < 10 and tries[-1].outcome in REFUSED and not tries[-1].refused_at_once:
        tries.append(_attempt(kind, address, port, uid, timeout))
    return min(tries, key=lambda one: one.ms)


def _attempt(kind: str, address: str, port: int, uid: int, timeout: float) -> Attempt:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        sock = _socket(kind, family, uid)
    except OSError as error:
        return Attempt((kind, address, port), errno.errorcode[error.errno], 0.0)
    start = time.perf_counter()
    with sock:
        sock.settimeout(timeout)
        try:
            outcome = _exchange(sock, kind, address, port)
        except TimeoutError:
            outcome = "timeout"
        except OSError as error:
            outcome = errno.errorcode.get(error.errno, str(error))
    return Attempt((kind, address, port), outcome, (time.perf_counter() - start) * 1000)


def _socket(kind: str, family: int, uid: int) -> socket.socket:
    if kind == "icmp":  # only root may: as in a session, where nobody may at all
        return socket.socket(family, socket.SOCK_RAW, 58 if family == socket.AF_INET6 else 1)
    with as_user(uid):
        return socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)


def _exchange(sock: socket.socket, kind: str, address: str, port: int) -> str:
    sock.connect((address, 0 if kind == "icmp" else port))
    if kind == "icmp":
        echo = 128 if sock.family == socket.AF_INET6 else 8
        body = struct.pack("!BBHHH", echo, 0, 0, os.getpid() & 0xFFFF, 1)
        if echo == 8:
            body = body[:2] + struct.pack("!H", _checksum(body)) + body[4:]
        sock.send(body)
    else:
        sock.send(b"ping")
    sock.recv(2048)
    return "open"


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


class Wire:
    """`family` is "dual", "v4" (no IPv6 address), "v6" (no IPv4 address) or "sysctl" (IPv6 disabled)."""

    def __init__(self, family: str = "dual") -> None:
        tag = f"{os.getpid()}-{next(_numbers)}"
        self.box, self.far = f"initd-kt-box-{tag}", f"initd-kt-far-{tag}"
        self._server = 0
        self._background: list[int] = []
        try:
            self._build(family)
            self._serve()
            self.do(_connected, FAR6 if family == "v6" else FAR4)
            self.arrived()
        except BaseException:
            self.close()
            raise

    def _build(self, family: str) -> None:
        for name in (self.box, self.far):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "link", "add", "eth0", "netns", self.box, "type", "veth", "peer", "name", "eth0", "netns", self.far)
        if family == "sysctl":
            run("ip", "netns", "exec", self.box, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
        run("ip", "netns", "exec", self.far, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
        box, far = ["link set eth0 up"], ["link set eth0 up"]
        if family != "v6":
            box += [f"addr add {BOX4}/24 dev eth0", f"route add default via {FAR4}"]
            far += [f"addr add {FAR4}/24 dev eth0"]
        if family in {"dual", "v6"}:
            # Duplicate address detection would keep addresses tentative for a second (RFC 4862, 5.4).
            box += [f"addr add {BOX6}/64 dev eth0 nodad", f"route add default via {FAR6}"]
            far += [f"addr add {FAR6}/64 dev eth0 nodad"]
        far += [f"route add local {network} dev lo" for network in OWNED]
        for name, lines in ((self.box, box), (self.far, far)):
            run("ip", "-n", name, "-batch", "-", text="\n".join(lines) + "\n")

    def _serve(self) -> None:
        ready, tell = os.pipe()
        self._commands, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server = os.fork()
        if not self._server:
            code = 1
            try:
                os.close(ready)
                self._commands.close()
                enter(self.far)
                far = _FarSide(child)
                os.write(tell, b"!")
                far.serve()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(tell)
        child.close()
        with os.fdopen(ready, "rb") as pipe:
            assert pipe.read(1) == b"!", "the far side did not start"

    def arriving(self) -> list[tuple[str, int]]:
        """What has arrived as soon as there is something, or nothing after five seconds."""
        until = time.monotonic() + 5
        while not (seen := self.arrived()) and time.monotonic() < until:
            time.sleep(0.01)
        return seen

    def arrived(self) -> list[tuple[str, int]]:
        """(destination, IP protocol) of every packet that came over the cable since the last call; no discovery."""
        self._commands.send(b"?")
        return pickle.loads(self._commands.recv(1 << 20))

    def do(self, function, *arguments, seconds: float = 120.0):
        """What `function` returns in a child inside the box; its failure is raised here, with its traceback."""
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(read)
                enter(self.box)
                answer = (True, function(*arguments))
            except BaseException:
                answer = (False, traceback.format_exc())
            with contextlib.suppress(BaseException), os.fdopen(write, "wb") as pipe:
                pickle.dump(answer, pipe)
            os._exit(0)
        os.close(write)
        try:
            with os.fdopen(read, "rb") as pipe:
                data = _read_all(pipe.fileno(), seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if not data:
            raise AssertionError(f"the child in the box ended without an answer: wait status {status}")
        good, value = pickle.loads(data)
        assert good, f"in the box:\n{value}"
        return value

    def background(self, prepare) -> None:
        """Run `prepare()` and then, for as long as the wire is there, what it returned, in a child inside the box."""
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(read)
                enter(self.box)
                loop = prepare()
                os.write(write, b"!")
                os.close(write)
                loop()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        self._background.append(child)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            assert pipe.read(1) == b"!", "the background child failed, see above"

    def shell(self, *argv: str, check: bool = True) -> str:
        return run("ip", "netns", "exec", self.box, *argv, check=check)

    def close(self) -> None:
        while self._background:
            os.kill(self._background[-1], signal.SIGKILL)
            os.waitpid(self._background.pop(), 0)
        if self._server:
            os.kill(self._server, signal.SIGKILL)
            os.waitpid(self._server, 0)
            self._commands.close()
            self._server = 0
        for name in (self.box, self.far):
            if os.path.exists(f"/run/netns/{name}"):
                for pid in run("ip", "netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                run("ip", "netns", "delete", name)


def _connected(target: str) -> None:
    """A veth pair carries nothing until the kernel has noticed, some milliseconds later, that both ends are up."""
    until = time.monotonic() + 10
    while _attempt("tcp", target, 443, 0, 0.1).outcome != "open":
        assert time.monotonic() < until, "the cable stays dead"


def _read_all(descriptor: int, seconds: float) -> bytes:
    until = time.monotonic() + seconds
    data = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise AssertionError(f"no answer from the box within {seconds} s")
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return data
        data += piece


class _FarSide:
    """Echo on `PORTS`, TCP and UDP, and note what arrives.

    A TCP peer that says "hold" gets a byte each 20 ms, one that says "reset" gets that.
    """

    def __init__(self, commands: socket.socket) -> None:
        self.commands = commands
        self.sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        self.sniffer.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        self.sniffer.setsockopt(263, 23, 1)  # SOL_PACKET, PACKET_IGNORE_OUTGOING
        self.sniffer.bind(("eth0", 3))  # ETH_P_ALL
        self.poll = select.epoll()
        self.poll.register(commands, select.EPOLLIN)
        self.sockets: dict[int, socket.socket] = {}
        self.listeners: set[int] = set()
        self.feeds: dict[int, socket.socket] = {}
        self.seen: list[tuple[str, int]] = []
        for port, kind in itertools.product(PORTS, (socket.SOCK_STREAM, socket.SOCK_DGRAM)):
            self.listen(port, kind)

    def listen(self, port: int, kind: int) -> None:
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(41, 26, 0)  # IPV6_V6ONLY
        if kind == socket.SOCK_DGRAM:
            sock.setsockopt(41, 49, 1)  # IPV6_RECVPKTINFO: answer from the address that was asked
            sock.setsockopt(41, 78, 1)  # IPV6_FREEBIND: also when no interface has it
        sock.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            sock.listen(512)
            self.listeners.add(sock.fileno())
        self.watch(sock)

    def watch(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sockets[sock.fileno()] = sock
        self.poll.register(sock, select.EPOLLIN)

    def serve(self) -> None:
        while True:
            for number, _ in self.poll.poll(0.02 if self.feeds else -1):
                if number == self.commands.fileno():
                    if not self.commands.recv(16):
                        return
                    _drain(self.sniffer, self.seen)
                    self.commands.send(pickle.dumps(self.seen[:8000]))
                    self.seen.clear()
                    continue
                with contextlib.suppress(OSError):
                    self.answer(self.sockets[number])
            for sock in self.feeds.values():
                with contextlib.suppress(OSError):
                    sock.send(b".")

    def answer(self, sock: socket.socket) -> None:
        if sock.fileno() in self.listeners:
            self.watch(sock.accept()[0])
        elif sock.type == socket.SOCK_DGRAM:
            data, ancillary, _, peer = sock.recvmsg(2048, 256)
            sock.sendmsg([data], ancillary, 0, peer)
        else:
            data = b""
            with contextlib.suppress(OSError):
                data = sock.recv(65536)
            if data == b"hold":
                self.feeds[sock.fileno()] = sock
            if data == b"reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif data:
                sock.send(data)
                return
            self.poll.unregister(sock)
            self.feeds.pop(sock.fileno(), None)
            self.sockets.pop(sock.fileno()).close()


def _drain(sniffer: socket.socket, seen: list[tuple[str, int]]) -> None:
    while True:
        try:
            frame = sniffer.recv(256)
        except BlockingIOError:
            return
        if frame[12:14] == b"\x08\x00":
            seen.append((socket.inet_ntop(socket.AF_INET, frame[30:34]), frame[23]))
        elif frame[12:14] == b"\x86\xdd":
            number, start = frame[20], 54
            while number in {0, 60} and start + 8 < len(frame):  # hop-by-hop, destination options
                number, start = frame[start], start + 8 + frame[start + 1] * 8
            if number == 58 and (frame[start] in {130, 131, 132, 133, 134, 135, 136, 143}):
                continue  # the kernel's own: listener and neighbour discovery
            seen.append((socket.inet_ntop(socket.AF_INET6, frame[38:54]), number))
