"""Runs: warden. GitHub's published ranges: fetched over TLS, checked one by one, the last good copy kept.

The document is https://api.github.com/meta. It comes from outside, so nothing in it is believed: a range that is
special or too broad is skipped, a document of the wrong shape is an error, sizes and times are bounded.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import time
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from typing import TYPE_CHECKING, Any

from initd import __version__
from initd.core.ranges import too_broad
from initd.core.special import SPECIAL4, SPECIAL6
from initd.errors import InitdError
from initd.files import MissingFileError, read_regular

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from initd.core.ruleset import IPAddress, IPNetwork

HOST = "api.github.com"

KEYS = ("web", "api", "git")
"""The parts of the document that hold what `@github` is about; runners (`actions`) are strangers' machines."""

MAX_BYTES = 5 << 20
MAX_RANGES = 5_000
MAX_ADDRESSES = 4
"""Addresses that are tried, one after the other."""

_CHUNK = 1 << 16


class FeedError(InitdError):
    """The document cannot be had or cannot be used; the box goes on without it."""


def parse_meta(raw: bytes, *, report: Callable[[str], None] | None = None) -> tuple[IPNetwork, ...]:
    """The ranges in `raw`, sorted, without overlaps. `report` is told of each range that was skipped, and why.

    Raises FeedError when the document is unusable: not JSON, not of the known shape, too large, or nothing left.
    """
    networks: list[IPNetwork] = []
    for text in _listed(raw):
        try:
            networks.append(_range(text))
        except ValueError as error:
            if report is not None:
                report(str(error))
    if not networks:
        raise FeedError(f"the answer of {HOST}/meta holds no usable range")
    four = collapse_addresses(network for network in networks if isinstance(network, IPv4Network))
    six = collapse_addresses(network for network in networks if isinstance(network, IPv6Network))
    return (*four, *six)


def fetch_meta(addresses: Sequence[IPAddress], *, timeout: float, port: int = 443) -> bytes:
    """The document, from the first of `addresses` that answers, in at most `timeout` seconds altogether.

    The certificate must be api.github.com's; SSL_CERT_FILE is honoured. Raises OSError or FeedError.
    """
    import ssl  # noqa: PLC0415 - tens of milliseconds that a box without @github need not pay

    deadline = time.monotonic() + timeout
    context = ssl.create_default_context()
    candidates = addresses[:MAX_ADDRESSES]
    failures: list[str] = []
    for index, address in enumerate(candidates):
        share = _left(deadline) / (len(candidates) - index)
        try:
            with _connect(str(address), port, context, share) as connection:
                return _body(_exchange(connection, deadline))
        except OSError as error:
            failures.append(f"{address}: {error}")
            if time.monotonic() >= deadline:
                break
    raise ConnectionError("; ".join(failures) or f"no address of {HOST} to try")


def load_saved(path: Path) -> tuple[IPNetwork, ...] | None:
    """The ranges of the last good copy, None when there is none. Raises InitdError when it cannot be used."""
    try:
        raw = read_regular(path, MAX_BYTES)
    except MissingFileError:
        return None
    return parse_meta(raw)


def save(path: Path, raw: bytes) -> None:
    """Replace the copy at `path` in one step. Raises OSError, and then the old one is still there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _listed(raw: bytes) -> Iterator[object]:
    if len(raw) > MAX_BYTES:
        raise FeedError(f"the answer of {HOST}/meta is larger than {MAX_BYTES >> 20} MiB")
    try:
        document: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FeedError(f"the answer of {HOST}/meta is not JSON") from error
    if not isinstance(document, dict):
        raise FeedError(f"the answer of {HOST}/meta is not an object")
    lists = [document.get(key, []) for key in KEYS]
    if not all(isinstance(one, list) for one in lists):
        raise FeedError(f"in the answer of {HOST}/meta one of {', '.join(KEYS)} is not a list")
    if (count := sum(map(len, lists))) > MAX_RANGES:
        raise FeedError(f"the answer of {HOST}/meta has {count} ranges, more than {MAX_RANGES}")
    return (text for one in lists for text in one)


def _range(text: object) -> IPNetwork:
    """One range of the document. Raises ValueError that says why it cannot be GitHub's."""
    if not isinstance(text, str):  # ip_network would take a number for an address
        raise ValueError(f"{text!r:.60} is not text")  # noqa: TRY004 - the document is wrong, not the program
    try:
        network = ip_network(text)
    except ValueError:
        raise ValueError(f"{text!r:.60} is not a range") from None
    if reason := too_broad(network):
        raise ValueError(reason)
    special: tuple[IPNetwork, ...] = SPECIAL4 if network.version == 4 else SPECIAL6
    if inside := next((one for one in special if network.overlaps(one)), None):
        raise ValueError(f"{text} is in the special range {inside}")
    return network


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left


def _connect(address: str, port: int, context: ssl.SSLContext, timeout: float) -> ssl.SSLSocket:
    plain = socket.create_connection((address, port), timeout=timeout)
    try:
        return context.wrap_socket(plain, server_hostname=HOST)
    except BaseException:
        plain.close()
        raise


def _exchange(connection: ssl.SSLSocket, deadline: float) -> bytes:
    """Everything the server sends until it closes.

    Each receive gets what is left of the time, so that a server that sends a byte now and then gains nothing.
    """
    request = (
        f"GET /meta HTTP/1.1\r\nHost: {HOST}\r\nUser-Agent: initd/{__version__}\r\n"
        "Accept: application/json\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    connection.settimeout(_left(deadline))
    connection.sendall(request.encode())
    answer = bytearray()
    while True:
        connection.settimeout(_left(deadline))
        chunk = connection.recv(_CHUNK)
        if not chunk:
            return bytes(answer)
        answer += chunk
        if len(answer) > MAX_BYTES + _CHUNK:
            raise FeedError(f"the answer of {HOST}/meta is larger than {MAX_BYTES >> 20} MiB")


class _Received:
    """What http.client reads a response from: bytes that have all arrived."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, _mode: str) -> io.BytesIO:
        """The bytes as a file."""
        return io.BytesIO(self._raw)


def _body(raw: bytes) -> bytes:
    """The body of a 200 response, whole. Raises FeedError."""
    from http.client import HTTPException, HTTPResponse  # noqa: PLC0415 - see fetch_meta

    response = HTTPResponse(_Received(raw))  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
    except (HTTPException, ValueError) as error:
        raise FeedError(f"the answer of {HOST}/meta is cut off or not HTTP") from error
    if response.status != 200:
        raise FeedError(f"{HOST}/meta answered {response.status} {response.reason}"[:120])
    return body
