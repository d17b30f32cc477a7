"""Runs: warden, with NET_ADMIN. The `nftables` backend: one `inet` table of our own, replaced in one transaction.

libnftables writes rules and static sets; learned elements go over
netlink (`nftelements`), the read-back takes elements from there too and rules from libnftables' listing, which comes
from the kernel's bytecode and not from what was written.

The table has no owner (`flags owner`): the owner is one netlink socket (nft_table_lookup(), nlpid), and then `learn`,
which has to go on while another thread applies, could not have a socket of its own. Its flush by somebody else with
NET_ADMIN is found by `read`; emptied chains fall to their policy, which is drop.
"""

from __future__ import annotations

import errno
import os
import threading
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

from initd.core.ruleset import Element
from initd.errors import KernelError
from initd.kernel import base, libnftables, nftelements, nftlisting, nftrules
from initd.kernel.base import Counters, Listing, Probe

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from initd.core.ruleset import Ruleset

TABLE = f"inet {nftelements.TABLE}"
_REFRESH_TRIES = 5
_PIECE = 1000
"""Static elements a command; a piece fits any send buffer."""
_CHUNK = 500
"""Learned elements a transaction: 80 kB at most, where an unprivileged socket may send 208 kB (net.core.wmem_max)."""

_TRIALS: dict[str, tuple[str, str]] = {
    "ipv4": ("ip daddr 192.0.2.1 accept", "IPv4 filtering"),
    "ipv6": ("ip6 daddr 2001:db8::1 accept", "IPv6 filtering"),
    "sets": ("ip daddr . meta l4proto . th dport @ranges accept", "interval sets of concatenations (kernel 5.6)"),
    "timeouts": ("ip daddr @timed accept", "sets with time-outs"),
    "owner": ("meta skuid 1 accept", "matching a packet's user (meta skuid)"),
    "conntrack": ("ct state established accept", "connection tracking"),
    "reject": ("meta l4proto 6 reject with tcp reset; add rule {} reject with icmpx admin-prohibited", "reject"),
    "source": ("fib saddr type != local drop", "telling foreign sources from our own (nft_fib_inet)"),
    "nflog": ("limit rate 10/second log group 1", "NFLOG: refusals cannot be explained"),
}
"""Capability → the rule that needs it and how its absence reads."""
_TRIAL_SETS = {
    "sets": "ranges { type ipv4_addr . inet_proto . inet_service; flags interval; }",
    "timeouts": "timed { type ipv4_addr; flags timeout; }",
}
_NEEDED = frozenset(_TRIALS) - {"nflog"}


def _skeleton() -> Iterator[str]:
    """The table, counters, sets and chains; nothing changes where they are there already."""
    yield f"add table {TABLE}"
    yield from (f"add counter {TABLE} {name}" for name in nftrules.COUNTERS)
    yield from (f"add set {TABLE} {name} {{ {definition} }}" for name, definition in nftrules.set_types())
    for name, hook in nftrules.CHAINS.items():
        yield f"add chain {TABLE} {name}" + (f" {{ {hook} }}" if hook else "")


def _rules(rules: nftrules.Rules) -> Iterator[str]:
    yield f"flush table {TABLE}"  # rules only; sets keep their elements (nft(8))
    for chain, lines in rules.items():
        yield from (f"add rule {TABLE} {chain} {line}" for line in lines)


def _special() -> Iterator[str]:
    for name, networks in nftrules.special_sets().items():
        if nftelements.networks(name) != networks:
            yield f"flush set {TABLE} {name}"
            yield f"add element {TABLE} {name} {{ {', '.join(networks)} }}"


def _audit(end: float | None) -> Iterator[str]:
    yield f"flush set {TABLE} {nftrules.AUDIT}"
    left = base.seconds_left(end)
    if left is not None:
        timeout = f" timeout {left}s" if left else ""
        yield f"add element {TABLE} {nftrules.AUDIT} {{ ipv4{timeout}, ipv6{timeout} }}"


def _text(element: Element) -> str:
    return f"{element.network} . {nftelements.PROTOCOLS[element.proto]} . {element.port}"


def _difference(name: str, wanted: Iterable[Element]) -> Iterator[str]:
    """Commands that take the set from what the kernel holds to `wanted`, unchanged elements untouched.

    Not flush and add: until 6.17 a lookup between the generation's change and the new match table of nft_set_pipapo
    finds neither the old element nor the new one.
    """
    keys = {nftelements.key_of(element): element for element in wanted}
    there = nftelements.held(name)
    gone = [nftelements.element_of(key) for key in sorted(there - keys.keys())]
    if None in gone:  # somebody else's ranges: not worth a vocabulary
        yield f"flush set {TABLE} {name}"
        gone, there = [], set()
    for verb, members in (
        ("delete", [_text(element) for element in gone if element]),
        ("add", [_text(keys[key]) for key in sorted(keys.keys() - there)]),
    ):
        for start in range(0, len(members), _PIECE):
            yield f"{verb} element {TABLE} {name} {{ {', '.join(members[start : start + _PIECE])} }}"


def _wanted(ruleset: Ruleset) -> Iterator[tuple[str, frozenset[Element]]]:
    for kind, elements in (("static", ruleset.static), ("private", ruleset.private)):
        for version, members in nftrules.merged(elements).items():
            yield f"initd{version}-{kind}", members


class Nftables:
    """`initd.kernel.base.Backend` over nf_tables, kernel 5.6 or newer."""

    name = "nftables"

    def __init__(self) -> None:
        self._channel = nftelements.Channel()
        self._lock = threading.Lock()  # learn and forget share the channel

    def probe(self) -> Probe:
        """Each feature as a transaction of its own that the kernel judges and aborts: nothing stays behind.

        Raises PrivilegeError without NET_ADMIN: then nothing was found out.
        """
        try:
            libnftables.run("add table inet initd-probe", dry=True)
        except KernelError as error:
            missing = (f"nf_tables with the inet family ({error.message.removeprefix('nftables: ')})",)
            return Probe(self.name, usable=False, capabilities=dict.fromkeys(_TRIALS, False), missing=missing)
        failed: dict[str, str] = {}
        for name, (trial, what) in _TRIALS.items():
            try:
                self._try(name, trial)
            except KernelError as error:
                failed[name] = f"{what} ({error.message.removeprefix('nftables: ')})"
        usable = not failed.keys() & _NEEDED
        return Probe(self.name, usable, {name: name not in failed for name in _TRIALS}, tuple(failed.values()))

    @staticmethod
    def _try(name: str, trial: str) -> None:
        chain = "inet initd-probe trial"
        hook = "{ type filter hook output priority 0; policy accept; }"
        commands = ["add table inet initd-probe", f"add chain {chain} {hook}"]
        if name in _TRIAL_SETS:
            commands.append(f"add set inet initd-probe {_TRIAL_SETS[name]}")
        libnftables.run("\n".join([*commands, f"add rule {chain} {trial.format(chain)}"]), dry=True)

    def lockdown(self, warden_uid: int) -> None:
        """Our table anew, whatever it was, with nothing but loopback open."""
        commands = [f"add table {TABLE}", f"delete table {TABLE}", *_skeleton()]
        for name, networks in nftrules.special_sets().items():
            commands.append(f"add element {TABLE} {name} {{ {', '.join(networks)} }}")
        libnftables.run("\n".join([*commands, *_rules(nftrules.locked(warden_uid))]))

    def apply(self, ruleset: Ruleset) -> None:
        """One transaction: rules replaced, static sets changed by their difference, learned sets left alone.

        In a user namespace (rootless engines) nobody may lift the send buffer's limit (SO_SNDBUFFORCE), and a
        transaction of more than about 3,000 new ranges does not fit. Then the sets change piece by piece, and the rules
        that use them last.
        """
        steps = ["\n".join(_skeleton())]
        for name, elements in _wanted(ruleset):
            steps += _difference(name, elements)
        steps.append("\n".join([*_special(), *_audit(ruleset.audit), *_rules(nftrules.enforcing(ruleset))]))
        try:
            libnftables.run("\n".join(steps))
        except KernelError as error:
            if os.strerror(errno.EMSGSIZE) not in error.message:
                raise
            for step in steps:
                libnftables.run(step)

    def expect(self, ruleset: Ruleset) -> Listing:
        """The listing of `apply(ruleset)`."""
        rules: dict[str, tuple[str, ...]] = {"inet/initd": ()}
        for chain, lines in nftrules.enforcing(ruleset).items():
            rules[f"inet/{chain}"] = (*filter(None, [nftrules.CHAINS[chain]]), *lines)
        special = nftrules.special_sets()
        for name, definition in nftrules.set_types():
            rules[f"set/{name}"] = (definition, *special.get(name, ()))
        learned = frozenset(name for name, _ in nftrules.set_types() if name.endswith("-learned"))
        return Listing(rules, dict(_wanted(ruleset)), learned)

    def read(self) -> Listing:
        """The table as the kernel has it; an empty listing when there is none."""
        flags = nftelements.table_flags()
        if flags is None:
            return Listing()
        if flags:  # not in force (1) or not ours any more (2); libnftables 1.0.6 lists it as broken JSON besides
            return Listing({"inet/initd": (f"flags {flags}",)})
        rules: dict[str, list[str]] = {"inet/initd": []}
        names: list[str] = []
        for item in libnftables.listing(f"list table {TABLE}"):
            ((kind, body),) = item.items()
            if kind == "chain":
                rules[f"inet/{body['name']}"] = list(filter(None, [nftlisting.chain(body)]))
            elif kind == "rule":
                rules[f"inet/{body['chain']}"].append(nftlisting.rule(body["expr"]))
            elif kind in {"set", "map"}:
                names.append(body["name"])
                rules[f"{kind}/{body['name']}"] = [nftlisting.definition(body)]
        for name in nftrules.special_sets():
            if name in names:
                rules[f"set/{name}"] += nftelements.networks(name)
        static = [name for name in names if name.endswith(("-static", "-private"))]
        return Listing(
            {label: tuple(lines) for label, lines in rules.items()},
            {name: frozenset(map(_listed, nftelements.held(name))) for name in static},
            frozenset(name for name in names if name.endswith("-learned")),
        )

    def learn(self, elements: Iterable[tuple[Element, int]]) -> None:
        """On a socket of our own, a transaction for each `_CHUNK` elements; returns after the last acknowledgement."""
        wanted = list(dict(elements).items())
        for start in range(0, len(wanted), _CHUNK):
            self._transact(nftelements.refreshing(dict(wanted[start : start + _CHUNK])), "learning addresses")

    def forget(self, elements: Iterable[Element]) -> None:
        """As `learn`; a missing element is added and deleted within the transaction, unseen."""
        unwanted = list(dict.fromkeys(elements))
        for start in range(0, len(unwanted), _CHUNK):
            self._transact(nftelements.removing(unwanted[start : start + _CHUNK]), "forgetting learned addresses")

    def _transact(self, messages: list[bytes], what: str) -> None:
        code = 0
        with self._lock:
            for _ in range(_REFRESH_TRIES):
                try:
                    code = self._channel.transact(messages)
                except OSError as error:
                    self._channel.close()
                    raise libnftables.error_of(error.errno or errno.EIO, what) from error
                if code != errno.ENOENT:  # else it expired between our add and our delete
                    break
        if code:
            raise libnftables.error_of(code, what)

    def learned(self) -> dict[Element, int]:
        """Learned elements with their remaining seconds."""
        names = (name for name, _ in nftrules.set_types() if name.endswith("-learned"))
        return {element: left for name in names for element, left in nftelements.remaining(name).items()}

    def counters(self) -> Counters:
        """Refusals since the lockdown; they survive `apply`."""
        return Counters(nftelements.counters())

    def teardown(self) -> None:
        """Delete the table, if there is one."""
        libnftables.run(f"add table {TABLE}\ndelete table {TABLE}")


def _listed(key: nftelements.Key) -> Element:
    """A held key as an element; one that we never write becomes an element that no ruleset can hold."""
    return nftelements.element_of(key) or Element(IPv4Network("0.0.0.0/0"), f"{key[0].hex()}-{key[1].hex()}", 0)
