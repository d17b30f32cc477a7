"""Runs: warden. The `xtables` backend: legacy ip_tables for the rules, ipsets for the addresses.

One commit a family, an atomic table replacement, builds our chains and hooks together; libiptc carries everybody
else's rules and counters over. The reader is iptables-legacy-save, which shares nothing with the writer but the kernel.
"""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
from ipaddress import ip_network
from pathlib import Path
from socket import AF_INET6, SOCK_DGRAM, socket
from typing import TYPE_CHECKING, Any

from initd.core.ruleset import LEARNED_MOST, Element
from initd.core.special import SPECIAL4, SPECIAL6
from initd.errors import KernelError
from initd.kernel import chains as rules
from initd.kernel import ipset, libiptc
from initd.kernel.base import Counters, Listing, Probe, seconds_left
from initd.kernel.netlink import NETFILTER, Netlink, NetlinkRefusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from initd.core.ruleset import Ruleset

_PROGRAMS = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin"
_READER_SECONDS = 10
_TITLE = {4: "ip", 6: "ip6"}
_HALVES = {
    version: [Element(half, ipset.ANY, 0) for half in ip_network(every).subnets()]
    for version, every in ((4, "0.0.0.0/0"), (6, "::/0"))
}
"""Every address; no set can hold a prefix length of 0."""
_COUNTED = re.compile(r"\[(\d+):\d+\] -A (INITD-\S+) (.*-j (?:REJECT|DROP).*)")


class Xtables:
    """`initd.kernel.base.Backend` on legacy tables. IPv6 is left out only where the kernel has none at all."""

    name = "xtables"

    def __init__(self) -> None:
        self.versions = (4, 6) if _has_ipv6() else (4,)
        self._learned = {version: _learned_spec(version) for version in self.versions}
        self._audit = [
            ipset.SetSpec(rules.set_name(version, "audit"), "hash:net", version, timeout=0) for version in self.versions
        ]
        self._learner = ipset.Learner(self._learned)

    def probe(self) -> Probe:
        """Try each part with a throw-away set and an unhooked chain. Raises PrivilegeError without NET_ADMIN."""
        from initd.kernel.trial import attempt  # noqa: PLC0415

        return attempt(self)

    def lockdown(self, warden_uid: int) -> None:
        """See `Backend.lockdown`. Needs neither sets nor connection tracking."""
        self._write(lambda version: rules.lockdown(version, warden_uid))

    def apply(self, ruleset: Ruleset) -> None:
        """See `Backend.apply`: sets first, because rules name them; then one commit a family."""
        with ipset.SetWriter() as sets:
            contents = dict(self._contents(ruleset))
            if (left := seconds_left(ruleset.audit)) is not None:
                for spec in self._audit:
                    if not sets.load(spec, _HALVES[spec.version], timeout=left):
                        raise KernelError(f"ipset: {spec.name} is of another type", hint="remove what uses it")
            blocked = [spec for spec, elements in contents.items() if not sets.load(spec, elements)]
            late = [spec for spec in self._learned.values() if not sets.ensure_learned(spec)]
            if blocked or late:
                # A set of our name but of another type cannot be swapped; closing first lets go of it without a gap.
                self.lockdown(ruleset.warden_uid)
                for spec in (*blocked, *late):
                    if not sets.destroy(spec.name) or not sets.load(spec, contents.get(spec, ())):
                        raise KernelError(
                            f"ipset: {spec.name} is of another type, and a rule that is not ours holds it",
                            hint="remove the rule that names it",
                        )
            self._write(lambda version: rules.chains(version, ruleset))
            if ruleset.audit is None:
                for spec in self._audit:
                    sets.destroy(spec.name)

    def expect(self, ruleset: Ruleset) -> Listing:
        """See `Backend.expect`."""
        listed: dict[str, tuple[str, ...]] = {}
        for version in self.versions:
            for chain, members in (rules.hooks() | rules.chains(version, ruleset)).items():
                listed[f"{_TITLE[version]}/{chain}"] = tuple(rule.text(chain) for rule in members)
        sets = {spec.name: frozenset(elements) for spec, elements in self._contents(ruleset)}
        return Listing(listed, sets, frozenset(spec.name for spec in self._learned.values()))

    def read(self) -> Listing:
        """See `Backend.read`. A built-in chain is listed up to our last hook, so one that is not first shows."""
        listed: dict[str, tuple[str, ...]] = {}
        for version, text in zip(self.versions, self._saved(), strict=True):
            for chain, lines in _ours(text).items():
                listed[f"{_TITLE[version]}/{chain}"] = lines
        sets: dict[str, frozenset[Element]] = {}
        with Netlink(NETFILTER) as link:
            for version in self.versions:
                for kind in ("private", "special", "static"):
                    name = rules.set_name(version, kind)
                    try:
                        sets[name] = frozenset(element for element, _ in ipset.read(link, name))
                    except NetlinkRefusal as refusal:
                        if refusal.code != errno.ENOENT:
                            raise ipset.trouble(refusal.code, f"reading {name}") from refusal
            learned = frozenset(
                spec.name
                for spec in self._learned.values()
                if ipset.kind_of(link, spec.name) == (spec.kind, spec.maxelem)
            )
        return Listing(listed, sets, learned)

    def learn(self, elements: Iterable[tuple[Element, int]]) -> None:
        """See `Backend.learn`; without IPv6 in the kernel an IPv6 address is nothing to insert, nor to reach."""
        self._learner.add((element, left) for element, left in elements if element.network.version in self._learned)

    def forget(self, elements: Iterable[Element]) -> None:
        """See `Backend.forget`."""
        self._learner.remove(element for element in elements if element.network.version in self._learned)

    def learned(self) -> dict[Element, int]:
        """See `Backend.learned`."""
        found: dict[Element, int] = {}
        with Netlink(NETFILTER) as link:
            for spec in self._learned.values():
                try:
                    found.update(ipset.read(link, spec.name))
                except NetlinkRefusal as refusal:
                    if refusal.code != errno.ENOENT:
                        raise ipset.trouble(refusal.code, f"reading {spec.name}") from refusal
        return found

    def counters(self) -> Counters:
        """Packets refused since the chains were last written, by what refused them."""
        refused = dict.fromkeys(("special", "unlisted", "dns", "input", "forward"), 0)
        for text in self._saved("-c"):
            for packets, chain, rule in _COUNTED.findall(text):
                refused[_reason(chain, rule)] += int(packets)
        return Counters(refused)

    def teardown(self) -> None:
        """Remove our hooks, chains and sets."""
        for version in self.versions:
            libiptc.edit_table(version, _remove)
        with ipset.SetWriter() as sets:
            for version in self.versions:
                for kind in ("private", "special", "static", "learned", "audit"):
                    sets.destroy(rules.set_name(version, kind))

    def _contents(self, ruleset: Ruleset) -> Iterator[tuple[ipset.SetSpec, Iterable[Element]]]:
        for version in self.versions:
            for kind, elements in (("private", ruleset.private), ("static", ruleset.static)):
                wanted = [element for element in elements if element.network.version == version]
                spec = ipset.SetSpec(rules.set_name(version, kind), "hash:net,port", version, ipset.room(len(wanted)))
                yield spec, wanted
            special = SPECIAL4 if version == 4 else SPECIAL6
            yield (
                ipset.SetSpec(rules.set_name(version, "special"), "hash:net", version),
                [Element(network, ipset.ANY, 0) for network in special],
            )

    def _write(self, wanted: Callable[[int], rules.Chains]) -> None:
        for version in self.versions:
            contents = wanted(version)

            def build(table: Any, version: int, contents: rules.Chains = contents) -> None:
                _put(table, version, contents)

            libiptc.edit_table(version, build)

    def _saved(self, *options: str) -> list[str]:
        try:
            running = [_listing([*_save_command(version), *options, "-t", "filter"]) for version in self.versions]
        except OSError as error:  # no process or descriptor to be had: the session's fork bomb, perhaps
            raise KernelError(f"iptables: the rules cannot be read: {error.strerror}") from error
        texts = []
        for process in running:
            try:
                text, complaint = process.communicate(timeout=_READER_SECONDS)
            except subprocess.TimeoutExpired as error:
                process.kill()
                process.communicate()
                raise KernelError(f"iptables: no listing after {_READER_SECONDS} s") from error
            if process.returncode:
                raise KernelError(f"iptables: the rules cannot be read: {complaint.strip() or process.returncode}")
            texts.append(text)
        return texts


def _listing(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603 - fixed arguments, absolute path
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _put(table: Any, version: int, contents: rules.Chains) -> None:
    for chain in contents:
        if table.is_chain(chain):
            table.flush_entries(chain)
        else:
            table.create_chain(chain)
    for chain, members in contents.items():
        for rule in members:
            table.append_entry(chain, libiptc.compiled(version, rule).rule)
    for builtin, (hook,) in rules.hooks().items():
        _unhook(table, builtin, libiptc.compiled(version, hook))
        table.insert_entry(builtin, libiptc.compiled(version, hook).rule, 0)


def _remove(table: Any, version: int) -> None:
    for builtin, (hook,) in rules.hooks().items():
        if table.is_chain(hook.target):
            _unhook(table, builtin, libiptc.compiled(version, hook))
            table.flush_entries(hook.target)
            table.delete_chain(hook.target)


def _unhook(table: Any, builtin: str, hook: Any) -> None:
    entry = hook.rule  # first: it fills in the offsets that the mask is made from
    while True:
        try:
            table.delete_entry(builtin, entry, hook.mask)
        except libiptc.load().IPTCError:
            return  # none left; any other trouble comes back at the commit


def _ours(text: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    hooked: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith(":INITD-"):
            found.setdefault(line[1:].split()[0], [])
        elif line.startswith("-A "):
            chain = line.split()[1]
            found.setdefault(chain, []).append(line)
            if chain in rules.HOOKS and line == f"-A {chain} -j {rules.HOOKS[chain]}":
                hooked[chain] = len(found[chain])
    kept = {chain: lines[: hooked[chain]] for chain, lines in found.items() if chain in hooked}
    kept.update((chain, lines) for chain, lines in found.items() if chain.startswith("INITD-"))
    return {chain: tuple(lines) for chain, lines in kept.items()}


def _reason(chain: str, rule: str) -> str:
    if chain != rules.HOOKS["OUTPUT"]:
        return "input" if chain == rules.HOOKS["INPUT"] else "forward"
    if f" {rules.ENGINE} " in rule:
        return "dns"
    return "special" if "-special " in rule else "unlisted"


def _learned_spec(version: int) -> ipset.SetSpec:
    name = rules.set_name(version, "learned")
    return ipset.SetSpec(name, "hash:ip,port", version, LEARNED_MOST, ipset.LEARNED_TIMEOUT)


def _has_ipv6() -> bool:
    """False only when the kernel has no IPv6 whatever: a sandbox that merely forbids the socket still has packets."""
    if Path("/proc/net/if_inet6").exists():
        return True
    try:
        socket(AF_INET6, SOCK_DGRAM).close()
    except OSError as error:
        return error.errno != errno.EAFNOSUPPORT
    return True


def _save_command(version: int) -> list[str]:
    for names in ((f"{_TITLE[version]}tables-legacy-save",), ("xtables-legacy-multi", f"{_TITLE[version]}tables-save")):
        if path := shutil.which(names[0], path=_PROGRAMS):
            return [path, *names[1:]]
    raise KernelError(
        "iptables-legacy-save is not installed", hint="install the iptables package with its legacy tools"
    )
