"""Addresses and ranges as a policy may list them: exact, explicit, and not so broad that the rest is pointless."""

from __future__ import annotations

import re
from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    NetmaskValueError,
    ip_network,
)
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initd.core.entries import IPNetwork

BROADEST4 = 8
"""Shortest IPv4 prefix: the largest range of RFC 1918, and a 256th of the net."""

BROADEST6 = 16
"""Shortest IPv6 prefix: a cloud's whole allocation fits, a registry's (/12, RFC 7020) does not."""

_EMBEDDED: tuple[tuple[IPv6Network, int, str], ...] = (
    (IPv6Network("64:ff9b::/96"), 96 + BROADEST4, "NAT64 (RFC 6052)"),
    (IPv6Network("2002::/16"), 16 + BROADEST4, "6to4 (RFC 3056)"),
)
"""IPv6 ranges that hold all of IPv4: the IPv4 limit applies to the part that is the IPv4 address."""

_MAPPED = IPv6Network("::ffff:0:0/96")
_THIS_HOST = IPv4Network("0.0.0.0/8")
_DIGITS = re.compile(r"\.*[0-9][0-9.]*(?:/.*)?", re.DOTALL)


class RangeFaultError(Exception):
    """Not a range that can be listed."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def looks_like(host: str) -> bool:
    """True when `host` can only be meant as an address or a range, whether it is a good one or not."""
    return host.startswith("[") or host.count(":") > 1 or _DIGITS.fullmatch(host) is not None


def is_ipv6(text: str) -> bool:
    """True for an IPv6 address in any of its spellings."""
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True


def parse_range(host: str) -> IPNetwork:
    """`192.0.2.1`, `192.0.2.0/24`, `2001:db8::1`, `[2001:db8::/32]`. Raises RangeFaultError."""
    text = host.removeprefix("[").removesuffix("]")
    address, slash, prefix = text.partition("/")
    if host.startswith("[") and ":" not in text:
        raise RangeFaultError("brackets are for IPv6 addresses", f"did you mean {text}?" if text else None)
    if host.endswith("]") and not host.startswith("["):
        raise RangeFaultError("']' without '['", f"did you mean [{text}]?")
    if "%" in text:
        raise RangeFaultError("a zone index has no meaning in a policy", f"did you mean {text.partition('%')[0]}?")
    if slash and not (prefix.isascii() and prefix.isdecimal() and len(prefix) <= 3):
        raise RangeFaultError(f"{prefix[:40]!r} is not a prefix length", _length_hint(address, prefix))
    try:
        network = ip_network(text, strict=False)
        first = IPv4Address(address) if network.version == 4 else IPv6Address(address)
    except ValueError as error:
        raise _why_not(address, prefix) from error
    if reason := too_broad(network):
        raise RangeFaultError(reason, "list the ranges or names that you need")
    if first != network.network_address:
        raise RangeFaultError(
            f"{text!r} has bits set beyond /{network.prefixlen}", f"did you mean {network} or {first}?"
        )
    _check_destination(network)
    return network


def too_broad(network: IPNetwork) -> str | None:
    """Why `network` is too large to be listed or fed, or None. Broader than /8 (IPv4) or /16 (IPv6) is."""
    limit = BROADEST4 if network.version == 4 else BROADEST6
    if network.prefixlen < limit:
        everything = " would list everything" if network.prefixlen == 0 else ""
        return f"'{network}'{everything or f' is too broad: at most /{limit} for IPv{network.version}'}"
    if isinstance(network, IPv6Network):
        for whole, least, what in _EMBEDDED:
            if network.subnet_of(whole) and network.prefixlen < least:
                return f"'{network}' is too broad: {what} holds all of IPv4 in it, at most /{least}"
    return None


def _check_destination(network: IPNetwork) -> None:
    if isinstance(network, IPv4Network):
        if network.subnet_of(_THIS_HOST):
            raise RangeFaultError(
                f"'{network.network_address}' is no destination: 0.0.0.0/8 means this host (RFC 1122)"
            )
    elif network.subnet_of(_MAPPED):
        inner = IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
        shown = inner.network_address if inner.prefixlen == 32 else inner
        raise RangeFaultError("an IPv4-mapped address never leaves as IPv6", f"did you mean {shown}?")
    elif network.prefixlen == 128 and network.network_address.is_unspecified:
        raise RangeFaultError("'::' is no destination: it means no address (RFC 4291)")


def _why_not(address: str, prefix: str) -> RangeFaultError:
    if ":" in address:
        if prefix and is_ipv6(address):
            return RangeFaultError(f"prefix length {prefix} is not between 0 and 128")
        return RangeFaultError(f"{address[:60]!r} is not an IPv6 address")
    parts = address.split(".")
    if len(parts) != 4 or not all(parts):
        return RangeFaultError(f"{address[:60]!r} is neither a name nor an address", "an IPv4 address has four numbers")
    large = next((part for part in parts if len(part.lstrip("0")) > 3 or int(part) > 255), None)
    if large is not None:
        return RangeFaultError(f"{address[:60]!r} is not an IPv4 address: {large[:12]} is above 255")
    if any(len(part) > 1 and part[0] == "0" for part in parts):
        plain = ".".join(str(int(part)) for part in parts)
        return RangeFaultError(
            f"{address!r} has leading zeros: some programs read them as octal", f"did you mean {plain}?"
        )
    return RangeFaultError(f"prefix length {prefix} is not between 0 and 32")


def _length_hint(address: str, prefix: str) -> str | None:
    """A netmask is what people mean by something with dots."""
    try:
        length = IPv4Network(f"0.0.0.0/{prefix}").prefixlen
        network = IPv4Network(f"{address}/{length}", strict=False)
    except (AddressValueError, NetmaskValueError, ValueError):
        return f"did you mean {address}?" if address else None
    return f"did you mean {network}?"
