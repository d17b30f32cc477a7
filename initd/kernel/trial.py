"""Runs: warden, once. What legacy xtables can do in this namespace, found by trying it and leaving nothing behind."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from initd.errors import KernelError
from initd.kernel import libiptc
from initd.kernel.base import Probe
from initd.kernel.chains import FOREIGN, Rule
from initd.kernel.ipset import SetSpec, SetWriter

if TYPE_CHECKING:
    from initd.kernel.xtables import Xtables

_NAME = "initd-trial"
_OPTIONAL = frozenset({"nflog"})


def attempt(backend: Xtables) -> Probe:
    """A `Probe` that names each absent kernel part. Raises PrivilegeError when it is us who may not."""
    missing: dict[str, str] = {}
    can = dict.fromkeys(("ipv4", "ipv6", "sets", "timeouts", "owner", "conntrack", "reject", "source", "nflog"), True)
    can["ipv6"] = 6 in backend.versions
    for version in backend.versions:
        for part, capability, complaint in _family(version):
            can[capability] = False
            missing[part] = complaint
    notes = [f"{part}: {complaint}" for part, complaint in missing.items()]
    if not can["ipv6"]:
        notes.append("ipv6: this kernel has none, so there is nothing to refuse")
    needed = [capability for capability in can if capability not in _OPTIONAL | {"ipv6"}]
    usable = all(can[capability] for capability in needed) and can["ipv6"] is (6 in backend.versions)
    return Probe(backend.name, usable, can, tuple(notes))


def _family(version: int) -> list[tuple[str, str, str]]:
    """(kernel part, capability, complaint) of whatever does not work for IP `version`."""
    failed: list[tuple[str, str, str]] = []
    spec = SetSpec(f"{_NAME}{version}", "hash:ip,port", version, timeout=60)
    sets = False
    try:
        with SetWriter() as writer:
            writer.destroy(spec.name)
            writer.create(spec)
            sets = True
            try:
                failed += _rules(version, spec.name)
            finally:
                writer.destroy(spec.name)
    except KernelError as error:
        failed.append(("ip_set", "sets", error.message))
    return failed if sets else failed + _rules(version, None)


def _rules(version: int, set_name: str | None) -> list[tuple[str, str, str]]:
    icmp = "ip" if version == 4 else "ip6"
    trials: list[tuple[str, str, Rule | None]] = [
        (f"{icmp}_tables", f"ipv{version}", None),
        ("xt_owner", "owner", Rule("ACCEPT", matches=(("owner", (("uid-owner", ("0",)),)),))),
        (
            "xt_conntrack, nf_conntrack",
            "conntrack",
            Rule("ACCEPT", matches=(("conntrack", (("ctstate", ("ESTABLISHED",)),)),)),
        ),
        (f"{icmp}t_REJECT", "reject", Rule("REJECT", (("reject-with", ("tcp-reset",)),), proto="tcp")),
        ("xt_addrtype", "source", FOREIGN),
        ("xt_NFLOG", "nflog", Rule("NFLOG", (("nflog-group", ("1",)),))),
    ]
    if set_name:
        trials.append(("xt_set", "sets", Rule("ACCEPT", matches=(("set", (("match-set", (set_name, "dst,dst")),)),))))
    if _complaint(version, [rule for _, _, rule in trials if rule]) is None:
        return []
    failed = []
    for part, capability, rule in trials:
        complaint = _complaint(version, [rule] if rule else [])
        if complaint is not None:
            failed.append((part, capability, complaint))
            if rule is None:
                break
    return failed


def _complaint(version: int, members: list[Rule]) -> str | None:
    """What the kernel says against a chain of these rules, None when it takes it."""
    try:
        libiptc.edit_table(version, partial(_trial_chain, members=members))
        libiptc.edit_table(version, partial(_trial_chain, members=None))
    except KernelError as error:
        return error.message
    return None


def _trial_chain(table: Any, version: int, *, members: list[Rule] | None) -> None:
    if table.is_chain("INITD-TRIAL"):
        table.flush_entries("INITD-TRIAL")
        if members is None:
            table.delete_chain("INITD-TRIAL")
            return
    else:
        table.create_chain("INITD-TRIAL")
    for rule in members or ():
        table.append_entry("INITD-TRIAL", libiptc.compiled(version, rule).rule)
