"""What was applied is believed only after it was read back: meddling in between, and swallowed writes, are found."""

from __future__ import annotations

import pytest

from initd.core.ruleset import Ruleset
from initd.enforce import Enforcer
from initd.errors import EnforcementError
from tests.kernel.test_contract import LISTED4, RULESET, armed, element, tries
from tests.kernel.wire import WARDEN, run

pytestmark = pytest.mark.kernel

NARROW = element("203.0.113.8/29")
MEDDLING = {
    "xtables": {
        "rule gone": ("iptables-legacy -D INITD-OUTPUT 3", "ip/INITD-OUTPUT: missing at 3"),
        "rule gone, IPv6": ("ip6tables-legacy -D INITD-INPUT 1", "ip6/INITD-INPUT: missing at 1"),
        "rule added": ("iptables-legacy -I INITD-OUTPUT 1 -j ACCEPT", "ip/INITD-OUTPUT: unexpected at 1"),
        "rule before the hook": ("iptables-legacy -I OUTPUT 1 -j ACCEPT", "ip/OUTPUT: unexpected at 1"),
        "hook gone": ("ip6tables-legacy -D OUTPUT -j INITD-OUTPUT", "ip6/OUTPUT: chain missing"),
        "element gone": ("ipset del initd4-static 203.0.113.8/29,tcp:443", "initd4-static: 1 missing: 203.0.113.8/29"),
        "element added": ("ipset add initd6-private fd00:99::/32,udp:53", "initd6-private: 1 unexpected: fd00:99::/32"),
    },
    "nftables": {
        "rules gone": ("nft flush table inet initd", "missing"),
        "table gone": ("nft delete table inet initd", "missing"),
        "element gone": ("nft flush set inet initd initd4-static", "initd4-static"),
        "element added": ("nft add element inet initd initd6-special { 3fff::/20 }", "initd6-special"),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "what"), [(name, what) for name, cases in MEDDLING.items() for what in cases], indirect=["backend"]
)
def test_meddling_between_apply_and_read_is_fatal(backend, wire, what):
    command, found = MEDDLING[backend.name][what]

    def body(meddle: bool):
        made = backend()
        apply = made.apply

        def meddled(ruleset: Ruleset) -> None:
            apply(ruleset)
            run(*command.split())

        if meddle:
            made.apply = meddled
        enforcer = Enforcer(made)
        try:
            enforcer.enforce(RULESET)
        except EnforcementError as error:
            return str(error), error.code, enforcer.recheck()
        quiet = enforcer.recheck()
        run(*command.split())
        return quiet, enforcer.recheck()

    text, code, after = wire.do(body, True)
    assert found in text
    assert code == 70
    assert after == ("nothing is enforced",)
    quiet, noticed = wire.do(body, False)
    assert quiet == (), "negative control: nobody meddled"
    assert any(found in line for line in noticed), "and later meddling is found by the health check"


def test_a_write_that_was_swallowed_is_fatal(backend, wire):
    def body():
        made = armed(backend, Ruleset(WARDEN))
        made.apply = lambda ruleset: None
        try:
            Enforcer(made).enforce(RULESET)
        except EnforcementError as error:
            return str(error)
        return ""

    assert "missing" in wire.do(body)


def test_reapplying_repairs(backend, wire):
    def body():
        enforcer = Enforcer(armed(backend))
        for command, _ in MEDDLING[backend.name].values():
            run(*command.split())
            enforcer.enforce(RULESET)
        return enforcer.recheck(), tries([("tcp", LISTED4), ("tcp", "203.0.113.77")])

    differs, (listed, unlisted) = wire.do(body)
    assert differs == ()
    assert listed.outcome == "open"
    assert unlisted.refused_at_once
