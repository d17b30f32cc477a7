"""The test's side of the lab's internet: ask what arrived there, and change how it answers while a box runs."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

from tests.support.dns_server import Logged
from tests.support.https_server import META, META_HOST, Meta, Request
from tests.support.namespaces import LabError
from tests.support.packets import Packet
from tests.support.zone import Entry, Fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

RESOLVER4, RESOLVER6 = "203.0.113.53", "2001:db8:2::53"
SILENT4, SILENT6 = "203.0.113.54", "2001:db8:2::54"
THIRD4, THIRD6 = "203.0.113.55", "2001:db8:2::55"
META_ADDRESS = "192.0.2.65"

# Present in every new lab; everything else is for the test to add.
WORLD = (
    Entry("github.com", {"A": ("192.0.2.97",)}),
    Entry(META_HOST, {"A": (META_ADDRESS,)}),
    Entry("site.example", {"A": ("203.0.113.10",), "AAAA": ("2001:db8:2::10",)}),
    Entry("other.example", {"A": ("203.0.113.20",), "AAAA": ("2001:db8:2::20",)}),
    Entry("v4.example", {"A": ("203.0.113.11",)}),
    Entry("v6.example", {"AAAA": ("2001:db8:2::11",)}),
)


class Remote:
    """A connection to the process in `internet`; one request at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(120)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rwb")

    def ask(self, do: str, **fields: Any) -> Any:
        """A request's result; raises LabError with the far side's traceback if it failed."""
        self._stream.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        self._stream.flush()
        line = self._stream.readline()
        if not line:
            raise LabError("the lab's internet has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise LabError(f"{do}: {answer['error']}")
        return answer["ok"]

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


class Dns:
    """The zone and the manners of the resolvers."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def set(self, name: str, records: Mapping[str, str | Sequence[str]] | None = None, **how: Any) -> None:
        """Add or replace one entry: `dns.set("a.example", {"A": "203.0.113.7"}, ttl=5, fault=Fault.SILENT)`."""
        plain = {
            kind: (values,) if isinstance(values, str) else tuple(values) for kind, values in (records or {}).items()
        }
        self.load([Entry(name, plain, **how)])

    def load(self, entries: Iterable[Entry]) -> None:
        """Add or replace many entries."""
        self._remote.ask("dns.load", entries=[entry.to_json() for entry in entries])

    def remove(self, *names: str) -> None:
        self._remote.ask("dns.remove", names=names)

    def server(self, address: str, *, fault: Fault | None = None, delay: float = 0.0) -> None:
        """Set how one server address behaves towards everybody; `delay` in seconds."""
        self._remote.ask("dns.server", address=address, fault=fault, delay=delay)

    def latency(self, seconds: float) -> None:
        """Delay every answer."""
        self._remote.ask("dns.latency", seconds=seconds)

    def queries(self, name: str | None = None) -> list[Logged]:
        """What was asked, in order of arrival, over any transport and at any address."""
        logged = [Logged(*item) for item in self._remote.ask("dns.log")]
        return [query for query in logged if name is None or query.name == name]

    def reset(self) -> None:
        """Back to the state of a new lab."""
        self._remote.ask("dns.clear")
        self.load(WORLD)
        self.latency(0.0)
        for address in (RESOLVER4, RESOLVER6, THIRD4, THIRD6):
            self.server(address)
        for address in (SILENT4, SILENT6):
            self.server(address, fault=Fault.SILENT)


class Web:
    """The web servers' log, what they serve, and what api.github.com/meta answers."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def meta(self, mode: Meta, *, body: Any = None) -> None:
        """Set the manner of /meta; `body` is for Meta.CUSTOM: text, or what is to be dumped as JSON."""
        text = body if body is None or isinstance(body, str) else json.dumps(body)
        self._remote.ask("web.meta", mode=mode, text=text)

    def files(self, files: Mapping[str, tuple[str, bytes]]) -> None:
        """Serve these and no others: path to content type and content."""
        self._remote.ask(
            "web.files", files={path: (kind, data.decode("latin-1")) for path, (kind, data) in files.items()}
        )

    def requests(self, host: str | None = None) -> list[Request]:
        logged = [Request(*item) for item in self._remote.ask("web.log")]
        return [request for request in logged if host is None or request.host == host]

    def reset(self) -> None:
        self.meta(Meta.GOOD, body=META)
        self.files({})


def packets(remote: Remote) -> list[Packet]:
    """Every packet that left the box since the last clear."""
    return [Packet(*item) for item in remote.ask("packets")]


def take(remote: Remote) -> tuple[list[Packet], list[Logged]]:
    """Packets and questions since the last take; each is told once, so a long run needs no memory for them."""
    got = remote.ask("take")
    return [Packet(*item) for item in got["packets"]], [Logged(*item) for item in got["queries"]]
