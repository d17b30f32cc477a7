"""Everybody else's rules are byte for byte the same before, during and after, whoever made them with whatever tool."""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING

import pytest

from tests.support import engine_dns, holding
from tests.support.attempts import attempt

if TYPE_CHECKING:
    from tests.support.lab import Lab

pytestmark = pytest.mark.kernel


def foreign(lab: Lab) -> str:
    """What is not ours of all rules: no line that names our chains, no table of ours."""
    text = re.sub(r"^table inet initd \{.*?^\}\n?", "", holding.rules(lab), flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in text.splitlines() if "INITD-" not in line)


@pytest.mark.parametrize("backend", ["xtables", "nftables"])
@pytest.mark.parametrize("tool", ["legacy", "nft"])
def test_foreign_rules_stay_as_they_are(lab: Lab, tool: str, backend: str) -> None:
    # Legacy tables exist from the first look on, so that looking is no difference.
    for table in ("filter", "nat"):
        for program in ("iptables-legacy", "ip6tables-legacy"):
            lab.exec([program, "-t", table, "-S"])
    engine_dns.put(lab, tool)
    before = foreign(lab)
    assert before.count("DOCKER_OUTPUT") >= 2
    assert "9100" in before
    with engine_dns.running(lab):
        box = lab.box(
            policy=holding.POLICY,
            resolv_conf=f"nameserver {engine_dns.ADDRESS}\n",
            env={"INITD_BACKEND": backend},
        )
        box.start()
        assert foreign(lab) == before, "after the start"
        assert attempt(box, ("tcp", "site.example", 443)).error is None, "and they still work"
        box.write_policy("v4.example\n192.0.2.7\n")
        assert box.fwctl("reload").returncode == 0
        assert foreign(lab) == before, "after a reload"
        os.kill(box.pids()["warden"], signal.SIGKILL)
        assert box.status()["generation"] == 2
        assert foreign(lab) == before, "after a restart"
        holding.flush(lab, backend)
        assert foreign(lab) == before, "what is flushed by hand is ours alone"
        assert box.stop().code == 0
        assert foreign(lab) == before, "after the stop"
        if tool == "nft":
            command = ["iptables-nft", "-t", "nat", "-D", "DOCKER_OUTPUT", "1"]
        else:
            command = ["iptables-legacy", "-t", "nat", "-D", "DOCKER_OUTPUT", "1"]
        assert lab.exec(command).returncode == 0
        assert foreign(lab) != before, "negative control: the comparison sees a rule that is gone"


@pytest.mark.parametrize("backend", ["xtables", "nftables"])
def test_foreign_rules_that_accept_everything_open_nothing(lab: Lab, backend: str) -> None:
    """Ours come first: what somebody accepts after them was refused before."""
    for tool in ("iptables-legacy", "iptables-nft"):
        assert lab.exec([tool, "-I", "OUTPUT", "-j", "ACCEPT"]).returncode == 0
    box = lab.box(policy=holding.POLICY, env={"INITD_BACKEND": backend})
    box.start()
    holding.assert_holds(lab, box)


def test_rules_put_before_ours_are_noticed(lab: Lab) -> None:
    """Root in the namespace may do so; `fwctl health` says it, and the next reload puts ours first again."""
    box = lab.box(policy=holding.POLICY, env={"INITD_BACKEND": "xtables"})
    box.start()
    assert box.fwctl("health").returncode == 0
    assert lab.exec(["iptables-legacy", "-I", "OUTPUT", "-j", "ACCEPT"]).returncode == 0
    assert attempt(box, ("tcp", "203.0.113.20", 443)).error is None
    health = box.fwctl("health")
    assert health.returncode == 1
    assert "FAIL rules" in health.stdout
    box.write_policy(f"{holding.POLICY}192.0.2.7\n")
    assert box.fwctl("reload").returncode == 0
    lab.clear()
    holding.assert_holds(lab, box)
