"""The rules as text, compared with golden files in the syntax of iptables-save."""

from __future__ import annotations

import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from initd.core.ruleset import Element, Endpoint, Ruleset
from initd.kernel import chains

CASES = Path(__file__).parents[1] / "cases" / "rules"


def ruleset_of(path: Path) -> Ruleset:
    """A ruleset as written in tests/cases/rules: "address#port", "network proto port"."""
    data = tomllib.loads(path.read_text())
    return Ruleset(
        data["warden_uid"],
        upstreams=frozenset(
            Endpoint(ip_address(address), int(port))
            for address, _, port in (u.partition("#") for u in data.get("upstreams", ()))
        ),
        engine_dns=data.get("engine_dns", False),
        static=_elements(data.get("static", ())),
        private=_elements(data.get("private", ())),
        subnets=frozenset(map(ip_network, data.get("subnets", ()))),
        log=data.get("log", True),
        audit=data.get("audit"),
    )


def _elements(lines) -> frozenset[Element]:
    split = [line.split() for line in lines]
    return frozenset(Element(ip_network(network), proto, int(port)) for network, proto, port in split)


def saved(ruleset: Ruleset) -> list[str]:
    lines = []
    for version, title in ((4, "# iptables"), (6, "# ip6tables")):
        made = chains.chains(version, ruleset)
        lines.append(title)
        lines += [rule.text(name) for name in ("INPUT", "FORWARD", "OUTPUT") for rule in chains.hooks()[name]]
        lines += [rule.text(name) for name in sorted(made) for rule in made[name]]
    return lines


@pytest.mark.parametrize("path", sorted(CASES.glob("*.xtables")), ids=lambda path: path.stem)
def test_golden(path):
    assert saved(ruleset_of(path.with_suffix(".toml"))) == path.read_text().splitlines()


def test_lockdown_needs_neither_sets_nor_tracking():
    for version in (4, 6):
        for name, members in chains.lockdown(version, 990).items():
            text = "\n".join(rule.text(name) for rule in members)
            assert "-m set" not in text
            assert "-m conntrack" not in text
            assert members[-1].target == "REJECT"
            assert members[-1].matches == ()


def test_every_chain_ends_with_an_unconditional_refusal():
    for path in CASES.glob("*.toml"):
        ruleset = ruleset_of(path)
        for version in (4, 6):
            for name, members in chains.chains(version, ruleset).items():
                last = members[-1]
                assert (last.target, last.matches, last.proto, last.destination) == ("REJECT", (), None, None), name
