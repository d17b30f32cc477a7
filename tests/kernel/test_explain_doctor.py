"""`fwctl doctor` finds what is wrong with each entry, in a box and before there is one."""

from __future__ import annotations

import json

import pytest

from tests.support import product
from tests.support.lab import Lab
from tests.support.zone import Entry, Fault

pytestmark = pytest.mark.kernel

POLICY = """\
good.example
same.example
alias.example
empty.example
failing.example
missing.example
wrong--name.example
to--good.example
to--elsewhere.example
closed.example:9
echo.example:5000
*.wild.example
203.0.113.0/28:443
bad.example
!bad.example
"""
ADDRESSES = {
    "good.example": "203.0.113.7",
    "same.example": "203.0.113.7",
    "wrong--name.example": "203.0.113.8",
    "to--good.example": "203.0.113.9",
    "to--elsewhere.example": "203.0.113.10",
    "elsewhere.example": "203.0.113.11",
    "echo.example": "203.0.113.12",
    "closed.example": "203.0.113.14",
    "bad.example": "203.0.113.13",
    "end.example": "203.0.113.6",
}
DOCTORED = [
    Entry("alias.example", {"CNAME": ("end.example.",)}),
    Entry("empty.example", {"TXT": ("nothing else",)}),
    Entry("failing.example", fault=Fault.SERVFAIL),
]


@pytest.fixture(scope="module")
def lab():
    with Lab() as made:
        for name, address in ADDRESSES.items():
            made.dns.set(name, {"A": address}, ttl=60)
        made.dns.load(DOCTORED)
        yield made


def findings(done):
    assert done.returncode in {0, 1}, done.stderr
    answer = json.loads(done.stdout)
    return answer, {one["entry"]: (one["state"], "; ".join(one["notes"])) for one in answer["entries"]}


def judge(found):
    assert found["good.example"] == ("ok", "shares an address with same.example")
    assert found["same.example"][0] == "ok"
    assert found["alias.example"][0] == "ok"
    assert "an alias of end.example" in found["alias.example"][1]
    assert found["missing.example"] == ("failed", "does not resolve: there is no such name (NXDOMAIN)")
    assert found["empty.example"][1].startswith("does not resolve: the name is there, but it has no address")
    assert found["failing.example"] == ("failed", "does not resolve: the resolver fails (SERVFAIL)")
    assert found["wrong--name.example"][0] == "failed"
    assert "TLS: Hostname mismatch" in found["wrong--name.example"][1]
    assert found["to--good.example"] == ("ok", "")
    assert found["to--elsewhere.example"] == ("warning", "redirects to elsewhere.example:443, which is not listed")
    assert found["closed.example:9"][0] == "failed"
    assert found["echo.example:5000"] == ("ok", "")
    assert {found[one][0] for one in ("*.wild.example", "203.0.113.0/28:443")} == {"untried"}
    assert found["bad.example"] == ("warning", "an exception says never: this line has no effect")


# First: the rules of a box outlive it.
def test_before_there_is_a_box_it_works_on_a_file(lab, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(POLICY)
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 203.0.113.53\n")
    script = (
        f"mount --bind {resolv} /etc/resolv.conf && SSL_CERT_FILE={lab.ca_file} {product.FWCTL} doctor --json {path}"
    )
    done = lab.exec(["env", "INITD_RUN_DIR=/nonexistent", "unshare", "-m", "sh", "-c", script])
    _, found = findings(done)
    judge(found)
    path.write_text("*.com\n")
    assert lab.exec([str(product.FWCTL), "doctor", str(path)]).returncode == 78


def test_in_a_box_it_tries_what_is_in_force_and_causes_no_refusal(lab):
    box = lab.box(policy=POLICY)
    box.start()
    done = box.fwctl("doctor", "--json", user="session")
    answer, found = findings(done)
    judge(found)
    assert (done.returncode, answer["failed"], answer["file"]) == (1, 5, "/run/initd/policy.txt")
    assert json.loads(box.fwctl("log", "--json").stdout)["rows"] == []
    shown = box.fwctl("doctor", user="session").stdout
    assert shown.splitlines()[0].split() == ["ENTRY", "STATE", "NOTES"]
    assert shown.splitlines()[-1].endswith("5 ok, 2 warning, 5 failed, 2 untried")
    box.write_policy("good.example\nto--elsewhere.example\n")
    box.fwctl("reload")
    assert box.fwctl("doctor").returncode == 0, "warnings do not fail a CI run"
    lab.close_boxes()
