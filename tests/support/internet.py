"""The whole internet of the lab in one process: DNS, web, echo and the packet log, steered over a UNIX socket.

Runs: root, inside the namespace `internet`, as `python -m tests.support.internet DIRECTORY`.
The socket speaks JSON lines: `{"do": name, …}` → `{"ok": result}` or `{"error": text}`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import traceback
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.authority import Authority
from tests.support.dns_server import DnsServer, Manner
from tests.support.https_server import META_HOST, Meta, WebServer
from tests.support.packets import Sniffer
from tests.support.zone import Entry, Fault, Zone

if TYPE_CHECKING:
    from collections.abc import Callable

SOCKET = "internet.sock"
_LINE_LIMIT = 64 << 20


class Internet:
    """Every method whose name starts with `do_` is a request."""

    def __init__(self, directory: Path) -> None:
        self.sniffer = Sniffer("eth0")
        self.zone = Zone()
        self.dns = DnsServer(self.zone)
        self.web = WebServer(Authority(ca_file=directory / "ca.pem", key_file=directory / "ca.key"))
        self._path = directory / SOCKET

    async def start(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        loop.add_reader(self.sniffer.socket.fileno(), self.sniffer.drain)
        await self.dns.start()
        await self.web.start()
        self.web.authority.context(META_HOST)
        return await asyncio.start_unix_server(self._serve, self._path, limit=_LINE_LIMIT)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line)
            try:
                action: Callable[..., Any] = getattr(self, "do_" + request.pop("do").replace(".", "_"))
                answer = {"ok": action(**request)}
            except Exception:
                answer = {"error": traceback.format_exc()}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    def do_dns_load(self, entries: list[dict[str, Any]]) -> None:
        self.zone.load(Entry.from_json(entry) for entry in entries)

    def do_dns_remove(self, names: list[str]) -> None:
        self.zone.remove(names)

    def do_dns_clear(self) -> None:
        self.zone.clear()

    def do_dns_server(self, address: str, fault: str | None, delay: float) -> None:
        self.dns.manners[address] = Manner(Fault(fault) if fault else None, delay)

    def do_dns_latency(self, seconds: float) -> None:
        self.dns.latency = seconds

    def do_dns_log(self) -> list[tuple[Any, ...]]:
        return [tuple(query) for query in self.dns.log]

    def do_web_log(self) -> list[tuple[Any, ...]]:
        return [tuple(request) for request in self.web.log]

    def do_web_meta(self, mode: str, text: str | None) -> None:
        self.web.meta = Meta(mode)
        if text is not None:
            self.web.meta_text = text

    def do_web_files(self, files: dict[str, tuple[str, str]]) -> None:
        self.web.files = {path: (kind, text.encode("latin-1")) for path, (kind, text) in files.items()}

    def do_packets(self) -> list[tuple[Any, ...]]:
        return [astuple(packet) for packet in self.sniffer.packets()]

    def do_take(self) -> dict[str, Any]:
        """Packets and names asked since the last `take` or `clear`, and forget them: nothing falls in between."""
        packets = [astuple(packet) for packet in self.sniffer.packets()]
        self.sniffer.forget()
        asked = [tuple(query) for query in self.dns.log]
        self.dns.log.clear()
        self.web.log.clear()
        return {"packets": packets, "queries": asked}

    def do_clear(self) -> None:
        """Forget packets, queries and requests."""
        self.sniffer.clear()
        self.dns.log.clear()
        self.web.log.clear()


async def main(directory: Path) -> None:
    server = await Internet(directory).start()
    gc.freeze()  # what exists now lives for ever: keep collections short
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
