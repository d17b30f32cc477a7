"""The rules of the xtables backend as data: order and meaning of docs/architecture.md ("Rules"), once for all readers.

A `Rule` says itself in the words of iptables-save(8), and in steps that python-iptables can take. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TYPE_CHECKING

from initd.core.ruleset import ENGINE_DNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from initd.core.ruleset import IPAddress, IPNetwork, Ruleset

HOOKS = {"OUTPUT": "INITD-OUTPUT", "INPUT": "INITD-INPUT", "FORWARD": "INITD-FORWARD"}
"""Built-in chain → ours, hooked first in it."""

ENGINE = ip_network(ENGINE_DNS)
"""Docker's embedded resolver. Its DNAT has already rewritten port 53 when filter OUTPUT runs."""

NFLOG_GROUP = 1
NFLOG_PREFIX = "initd"

Options = tuple[tuple[str, tuple[str, ...]], ...]
"""Parameters of a match or target in the order in which iptables-save prints them; "!" first in a value negates it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; what is None is not asked about."""

    target: str
    options: Options = ()
    source: IPNetwork | None = None
    destination: IPNetwork | None = None
    inside: str | None = None  # -i
    outside: str | None = None  # -o
    proto: str | None = None
    matches: tuple[tuple[str, Options], ...] = ()

    def text(self, chain: str) -> str:
        """The line that iptables-save prints for it."""
        words = ["-A", chain]
        for flag, value in (
            ("-s", self.source), ("-d", self.destination), ("-i", self.inside), ("-o", self.outside), ("-p", self.proto)
        ):  # fmt: skip
            if value is not None:
                words += [flag, str(value)]
        for name, options in self.matches:
            words += ["-m", name, *_words(options)]
        return " ".join([*words, "-j", self.target, *_words(self.options)])


Chains = dict[str, tuple[Rule, ...]]
"""Chain name → its rules, in order."""


def _words(options: Options) -> Iterator[str]:
    for name, value in options:
        if value and value[0] == "!":
            yield "!"
        yield f"--{name}"
        yield from (word for word in value if word != "!")


def set_name(version: int, kind: str) -> str:
    """The name of a set of ours: `kind` is static, private, special, learned or audit."""
    return f"initd{version}-{kind}"


def hooks() -> Chains:
    """The one rule of ours that each built-in chain begins with."""
    return {builtin: (Rule(own),) for builtin, own in HOOKS.items()}


def lockdown(version: int, warden_uid: int) -> Chains:
    """Nothing but loopback, and 127.0.0.11 for the warden only."""
    discovery = _discovery(version)
    engine: list[Rule] = []
    if version == 4:
        engine = [_owned(warden_uid, destination=ENGINE), *_reject(4, destination=ENGINE)]
    return {
        HOOKS["OUTPUT"]: (*discovery, *_OURS, *engine, _loopback(version), *_reject(version)),
        HOOKS["INPUT"]: (Rule("ACCEPT", inside="lo"), *discovery, *_reject(version)),
        HOOKS["FORWARD"]: _reject(version),
    }


def chains(version: int, ruleset: Ruleset) -> Chains:
    """All of our chains of one family for `ruleset`."""
    special = (_in_set(version, "special"), _in_set(version, "learned", negated=True))
    output = (
        *_discovery(version),
        *_OURS,
        *((_STAND_IN,) if version == 4 else ()),
        *_warden(version, ruleset),
        *(_owned(0, proto=proto, port=53) for proto in ("udp", "tcp") if ruleset.engine_dns),
        *(_reject(4, destination=ENGINE) if version == 4 else ()),
        _loopback(version),
        *_no_riding(version, log=ruleset.log),
        *_going_on(version),
        Rule("ACCEPT", matches=(_in_set(version, "private"),)),
        *(_log("initd-special", matches=special) if ruleset.log else ()),
        *_reject(version, matches=special),
        Rule("ACCEPT", matches=(_in_set(version, "learned"),)),
        Rule("ACCEPT", matches=(_in_set(version, "static"),)),
        *_unlisted(version, ruleset),
    )
    subnets = sorted(_of(version, ruleset.subnets), key=lambda net: (int(net.network_address), net.prefixlen))
    inbound = (
        Rule("ACCEPT", inside="lo"),
        *_discovery(version),
        *_tracked(version),
        *(Rule("ACCEPT", source=subnet) for subnet in subnets),
        *_reject(version),
    )
    return {HOOKS["OUTPUT"]: output, HOOKS["INPUT"]: inbound, HOOKS["FORWARD"]: _reject(version)}


def _unlisted(version: int, ruleset: Ruleset) -> Iterator[Rule]:
    """Refuse the rest; audit mode lets it go, but to no resolver: names are asked of the guard, or none is recorded."""
    if ruleset.audit is not None:
        audited = (_in_set(version, "audit"),)
        resolver = (("tcp", (("dport", ("53",)),)),)  # over UDP `_no_riding` has refused it
        if ruleset.log:
            yield from _log(NFLOG_PREFIX, proto="tcp", matches=resolver)
        yield _reject(version, proto="tcp", matches=resolver)[0]
        if ruleset.log:
            yield from _log("initd-audit", matches=audited)
        yield Rule("ACCEPT", matches=audited)
    if ruleset.log:
        yield from _log(NFLOG_PREFIX)
    yield from _reject(version)


def _log(prefix: str, *, proto: str | None = None, matches: tuple[tuple[str, Options], ...] = ()) -> tuple[Rule]:
    limit = ("limit", (("limit", ("10/sec",)), ("limit-burst", ("20",))))
    where = (("nflog-prefix", (prefix,)), ("nflog-group", (str(NFLOG_GROUP),)))
    return (Rule("NFLOG", where, proto=proto, matches=(*matches, limit)),)


_ANSWER = ("tcp", (("tcp-flags", ("ACK", "ACK")),))
_RESET = ("tcp", (("tcp-flags", ("RST", "RST")),))
FOREIGN = Rule("DROP", matches=(("addrtype", (("src-type", ("!", "LOCAL")),)),))
_OURS = (Rule("ACCEPT", outside="lo", proto="tcp", matches=(_RESET,)), FOREIGN)
"""A source that is not ours, which IPv6 lets everybody have (IPV6_FREEBIND; ipv6_can_nonlocal_bind()).

Sent to ourselves it would have connection tracking know a flow from there, and what we answer would be established.
Dropped: a refusal would go to that source, and quote what was sent. But the resets with which we refuse come from where
the refused went, and no reset begins a flow (nf_conntrack_proto_tcp.c, tcp_conntracks).
"""

_STAND_IN = Rule("DROP", source=ENGINE, matches=(("conntrack", (("ctdir", ("ORIGINAL",)),)),))
"""The engine's resolver only answers, and from another port than 53.

Whoever sent from 127.0.0.11:53 to ports that the warden will ask from would have connection tracking take its questions
for answers to that: they would not be rewritten to the engine's port, and reach him.
"""


def _discovery(version: int) -> tuple[Rule, ...]:
    if version == 4:
        return ()
    return tuple(
        Rule("ACCEPT", proto="ipv6-icmp", matches=(("icmp6", (("icmpv6-type", (str(kind),)),)),))
        for kind in (133, 134, 135, 136)  # RFC 4861: solicitation and advertisement of routers and neighbours
    )


def _warden(version: int, ruleset: Ruleset) -> Iterator[Rule]:
    uid = ruleset.warden_uid
    upstreams = sorted(one for one in ruleset.upstreams if one.address.version == version)
    for address in dict.fromkeys(one.address for one in upstreams if one.address == ENGINE_DNS):
        yield _owned(uid, destination=_single(address))
    for upstream in upstreams:
        if upstream.address != ENGINE_DNS:
            for proto in ("udp", "tcp"):
                yield _owned(uid, destination=_single(upstream.address), proto=proto, port=upstream.port)


def _owned(uid: int, *, destination: IPNetwork | None = None, proto: str | None = None, port: int = 0) -> Rule:
    # Never by mark: NET_RAW is enough to set one (SO_MARK), a socket's owner cannot be forged.
    matches: list[tuple[str, Options]] = [("owner", (("uid-owner", (str(uid),)),))]
    if proto:
        matches.append((proto, (("dport", (str(port),)),)))
    return Rule("ACCEPT", destination=destination, proto=proto, matches=tuple(matches))


def _tracked(version: int) -> tuple[Rule, Rule]:
    icmp = "icmp" if version == 4 else "ipv6-icmp"
    return (
        Rule("ACCEPT", matches=(("conntrack", (("ctstate", ("ESTABLISHED",)),)),)),
        Rule("ACCEPT", proto=icmp, matches=(("conntrack", (("ctstate", ("RELATED",)),)),)),
    )


def _going_on(version: int) -> Iterator[Rule]:
    """What belongs to a flow that was let through; a SYN begins one.

    The reset with which INPUT refuses is related: nf_send_reset() ties it to the refused connection (nf_ct_attach).
    """
    icmp = "icmp" if version == 4 else "ipv6-icmp"
    established, tied = (("conntrack", (("ctstate", (state,)),)) for state in ("ESTABLISHED", "RELATED,ESTABLISHED"))
    yield Rule("ACCEPT", proto="tcp", matches=(_ANSWER, established))
    yield Rule("ACCEPT", proto="tcp", matches=(_RESET, tied))
    yield Rule("ACCEPT", proto="udp", matches=(established,))
    yield Rule("ACCEPT", proto=icmp, matches=(tied,))


def _loopback(version: int) -> Rule:
    """What is for ourselves.

    Whoever names lo as the way out (IP_PKTINFO, SO_BINDTODEVICE) gets there with any IPv4 address, which the kernel
    takes for a neighbour's (ip_route_output_key_hash_rcu()). It leads nowhere, but would begin a flow that the outside
    can answer. IPv6 has no route there; its `addrtype` knows other types.
    """
    ours = (("addrtype", (("dst-type", ("!", "UNICAST")),)),)
    return Rule("ACCEPT", outside="lo", matches=ours if version == 4 else ())


def _no_riding(version: int, *, log: bool) -> Iterator[Rule]:
    """UDP to port 53 is judged packet by packet, as is the first packet of a connection (`_going_on`).

    Connection tracking knows a flow by its addresses and ports alone, also after its end: for 30 s after UDP's last
    packet, and for 10 s or more after a reset. Whoever takes the source port of a question that the warden, or Docker's
    resolver, has just asked would count as established.
    """
    listed = tuple(_in_set(version, kind, negated=True) for kind in ("private", "learned", "static"))
    prohibited = "icmp-admin-prohibited" if version == 4 else "icmp6-adm-prohibited"
    matches = (("udp", (("dport", ("53",)),)), *listed)
    if log:
        yield from _log(NFLOG_PREFIX, proto="udp", matches=matches)
    yield Rule("REJECT", (("reject-with", (prohibited,)),), proto="udp", matches=matches)


def _in_set(version: int, kind: str, *, negated: bool = False) -> tuple[str, Options]:
    direction = "dst" if kind in {"special", "audit"} else "dst,dst"
    value = (set_name(version, kind), direction)
    return "set", (("match-set", ("!", *value) if negated else value),)


def _reject(
    version: int,
    *,
    destination: IPNetwork | None = None,
    proto: str | None = None,
    matches: tuple[tuple[str, Options], ...] = (),
) -> tuple[Rule, Rule]:
    prohibited = "icmp-admin-prohibited" if version == 4 else "icmp6-adm-prohibited"
    return (
        Rule("REJECT", (("reject-with", ("tcp-reset",)),), proto="tcp", destination=destination, matches=matches),
        Rule("REJECT", (("reject-with", (prohibited,)),), proto=proto, destination=destination, matches=matches),
    )


def _single(address: IPAddress) -> IPNetwork:
    return ip_network(address)


def _of(version: int, networks: Iterable[IPNetwork]) -> Iterator[IPv4Network | IPv6Network]:
    return (network for network in networks if network.version == version)
