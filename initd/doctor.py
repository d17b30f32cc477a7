"""Runs: anybody, on demand, in a box or before there is one. Tries each entry of a policy as a client would.

Does it resolve, connect, speak TLS for that name, lead elsewhere, share its address? 16 entries at once, a few seconds
for each step. Nothing is changed, and nothing but DNS questions and a HEAD request is sent.

Addresses come from getaddrinfo(3), as for any client; what it cannot say, why there are none and which alias leads to
them, the resolvers of resolv.conf(5) are asked.
"""

from __future__ import annotations

import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import dns.exception
import dns.rcode
import dns.resolver

from initd.core.cdn import cdn_of
from initd.core.events import printable
from initd.core.policy import DEFAULT_SERVICES, Service, Verdict
from initd.core.special import special_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from initd.core.policy import Lookup, NameRule, Policy

SECONDS = 5.0
"""For one connection, one handshake, one answer."""

AT_ONCE = 16
HOPS = 5
HEAD_LIMIT = 32 * 1024

TLS_PORTS = frozenset({443, 465, 636, 853, 993, 995, 6443, 8443})
HTTP_PORTS = frozenset({80, 443, 8443})
HTTPS = Service("tcp", 443)
NO_ADDRESS = "the name is there, but it has no address"


@dataclass(slots=True)
class Finding:
    """What was seen of one entry. `state` is ok, warning, failed, or untried for what cannot be."""

    entry: str
    line: int
    state: str = "ok"
    notes: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    ms: float = 0.0

    def worse(self, state: str, note: str) -> None:
        """Note something that is not as it should be."""
        self.notes.append(note)
        if self.state != "failed":
            self.state = state


def examine(policy: Policy, *, inside: bool) -> dict[str, Any]:
    """Try every entry. `inside` a box nothing unlisted is tried: it would be refused, and recorded as a refusal."""
    lookup = policy.lookup()
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        findings = list(pool.map(lambda rule: _name(rule, lookup, inside=inside), policy.names))
    _compare(findings, inside=inside)
    origins = [*(one.origin for one in policy.ranges), *(one.origin for one in policy.feeds)]
    findings += [Finding(one.text, one.line, "untried", ["no name to be tried by"]) for one in origins]
    findings.sort(key=lambda one: (one.line, one.entry))
    return {
        "entries": [asdict(one) for one in findings],
        **{state: sum(one.state == state for one in findings) for state in ("ok", "warning", "failed", "untried")},
    }


def _name(rule: NameRule, lookup: Lookup, *, inside: bool) -> Finding:
    text = f"*.{rule.name}" if rule.wildcard else rule.name
    if rule.services != DEFAULT_SERVICES:
        text += ":" + ",".join(str(one.port) + ("/udp" if one.proto == "udp" else "") for one in sorted(rule.services))
    found = Finding(text, rule.origin.line)
    if rule.wildcard:
        found.state, found.notes = "untried", ["a wildcard: which names there are nobody can tell"]
        return found
    if lookup.decide(rule.name).verdict is Verdict.DENIED:
        found.worse("warning", "an exception says never: this line has no effect")
        return found
    start = time.monotonic()
    try:
        infos = socket.getaddrinfo(rule.name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        reason = _why_not(rule.name) or error.strerror
        if inside and reason == NO_ADDRESS:  # the guard may have kept it back
            reason = f"{NO_ADDRESS}, or a private one that is not listed: ask `fwctl why {rule.name}`"
        found.worse("failed", f"does not resolve: {reason}")
        return found
    if alias := _alias(rule.name):
        found.notes.append(f"an alias of {printable(alias, 80)}")
    found.addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    for service in _to_try(rule):
        _service(found, rule.name, service, _Way(lookup, inside))
    found.ms = round((time.monotonic() - start) * 1000, 1)
    return found


def _why_not(name: str) -> str | None:
    """Why `name` has no address, in the words of DNS; None when it has one there."""
    try:
        answer = dns.resolver.resolve_name(name, lifetime=SECONDS)
    except dns.resolver.NXDOMAIN:
        return "there is no such name (NXDOMAIN)"
    except dns.resolver.NoAnswer:
        return NO_ADDRESS
    except dns.resolver.NoNameservers as error:  # its errors: (server, tcp, port, exception, response)
        rcodes = {one[4].rcode() for one in error.kwargs.get("errors", ()) if one[4] is not None}
        said = ", ".join(sorted(dns.rcode.to_text(rcode) for rcode in rcodes))
        return f"the resolver fails ({said})" if said else "no resolver can be reached"
    except dns.exception.Timeout:
        return f"no resolver answers within {SECONDS:g} s"
    except dns.exception.DNSException as error:
        return printable(str(error), 120)
    return None if list(answer.addresses()) else NO_ADDRESS


def _alias(name: str) -> str | None:
    """The name at the end of the aliases (CNAME) that `name` is, None when it is none."""
    try:
        answer = dns.resolver.resolve(name, "A", lifetime=SECONDS, raise_on_no_answer=False)
    except dns.exception.DNSException:  # a name of /etc/hosts, perhaps
        return None
    canonical = answer.canonical_name.to_text(omit_final_dot=True).lower()
    return None if canonical == name else canonical


def _to_try(rule: NameRule) -> list[Service]:
    """All TCP ports that were written; of the default three the one that everybody has."""
    if rule.services == DEFAULT_SERVICES:
        return [HTTPS]
    return sorted(one for one in rule.services if one.proto == "tcp")


@dataclass(frozen=True, slots=True)
class _Way:
    """What decides whether a redirect is followed."""

    lookup: Lookup
    inside: bool

    def open(self, host: str, port: int) -> bool:
        return Service("tcp", port) in self.lookup.decide(host).services


def _service(found: Finding, name: str, service: Service, way: _Way) -> None:
    url = f"{'https' if service.port in TLS_PORTS else 'http'}://{name}:{service.port}/"
    seen: set[str] = set()
    for _ in range(HOPS):
        try:
            answer = _head(url)
        except ssl.SSLCertVerificationError as error:
            found.worse(*_blame(url, name, f"TLS: {error.verify_message}"))
            return
        except (OSError, ValueError) as error:
            reason = (
                "no answer in time" if isinstance(error, TimeoutError) else str(error.args[-1] if error.args else error)
            )
            found.worse(*_blame(url, name, f"port {urlsplit(url).port or service.port}: {printable(reason, 80)}"))
            return
        target = _location(url, answer)
        if target is None or target in seen:
            return
        seen.add(target)
        host, port = _where(target)
        if not way.open(host, port):
            found.worse("warning", f"redirects to {printable(host, 80)}:{port}, which is not listed")
            if way.inside:
                return
        url = target


def _blame(url: str, name: str, words: str) -> tuple[str, str]:
    """The entry's own trouble is a failure, that of a place it led to a warning."""
    host = urlsplit(url).hostname
    return ("failed", words) if host == name else ("warning", f"{printable(str(host), 80)}: {words}")


def _head(url: str) -> bytes:
    """Connect, shake hands, and on a web port ask for the head; empty when there was nothing to ask."""
    host, port = _where(url)
    with socket.create_connection((host, port), SECONDS) as plain:
        sock = plain
        if port in TLS_PORTS:
            sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        if port not in HTTP_PORTS:
            return b""
        path = urlsplit(url).path or "/"
        request = f"HEAD {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: fwctl-doctor\r\nConnection: close\r\n\r\n"
        sock.sendall(request.encode("ascii", "ignore"))
        head = b""
        while b"\r\n\r\n" not in head and len(head) < HEAD_LIMIT and (data := sock.recv(4096)):
            head += data
        return head


def _location(url: str, head: bytes) -> str | None:
    """Where an answer leads, as an absolute http(s) URL; None when it leads nowhere (RFC 9110, 15.4)."""
    first, *fields = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) < 2 or words[1] not in {"301", "302", "303", "307", "308"}:
        return None
    for one in fields:
        key, _, value = one.partition(":")
        if key.strip().lower() == "location":
            try:
                target = urljoin(url, value.strip())
                return target if target.startswith(("http://", "https://")) and _where(target)[0] else None
            except ValueError:
                return None
    return None


def _where(url: str) -> tuple[str, int]:
    """Host and port of a URL. Raises ValueError for a port that is none."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _compare(findings: list[Finding], *, inside: bool) -> None:
    """Addresses that serve more than the one name: whoever opens it opens what else is there."""
    names: dict[str, list[str]] = {}
    for one in findings:
        for address in one.addresses:
            names.setdefault(address, []).append(one.entry)
    for one in findings:
        if others := dict.fromkeys(
            other for address in one.addresses for other in names[address] if other != one.entry
        ):
            one.notes.append(f"shares an address with {_few(list(others))}")
        one.notes += _neighbourhood(one.addresses, special=not inside or one.state == "failed")


def _neighbourhood(addresses: list[str], *, special: bool) -> Iterator[str]:
    """What else is at these addresses. Of special ones nothing is said where one has just been reached."""
    parsed = [ip_address(text.partition("%")[0]) for text in addresses]
    if cdns := sorted({owner for one in parsed if (owner := cdn_of(one))}):
        yield f"served by {', '.join(cdns)}: the same addresses serve other sites"
    for one in parsed if special else ():
        if (network := special_of(one)) and not one.is_loopback:
            yield f"{one} is in the special range {network}: refused unless listed as a range or a local name"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
