"""The status as Prometheus text: well-formed, complete, in base units."""

from __future__ import annotations

import re

import pytest

from initd import metrics

STATUS = {
    "version": "1.0", "backend": "nftables", "mode": "enforce", "ready": True, "uptime": 61.5, "generation": 2,
    "policy": {"names": 3, "wildcards": 1, "ranges": 0, "feeds": 1, "exceptions": 0, "file": "x", "source": "y"},
    "rules": {"static": 4, "private": 0, "learned": 7},
    "refused": {"unlisted": 5, "special": 1},
    "refusals": {"hour": 6, "lost": 0},
    "guard": {
        "queries": 12_345_678, "from_cache": 4, "forwarded": 3, "refused": 2, "failed": 0, "malformed": 0,
        "insert_failures": 0, "leases": 3, "upstream_p50": 12.5, "upstream_p99": 80.0,
        "upstreams": [{"server": '1.1.1.1 "a\\b\n', "ailing": True}],
    },
    "warnings": ["one"],
}  # fmt: skip
SAMPLE = re.compile(r'([a-z_0-9]+)(?:\{([a-z]+="(?:[^"\\\n]|\\.)*",?)+\})? -?[0-9.e+]+')


def test_every_line_is_of_the_format_and_every_family_declared_once():
    declared: list[str] = []
    for line in metrics.text(STATUS).splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            declared.append(name)
            assert kind == ("counter" if name.endswith("_total") else "gauge")
        elif not line.startswith("# HELP "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] == declared[-1]
    assert len(declared) == len(set(declared)) > 15
    assert all(name.startswith("initd_") for name in declared)


@pytest.mark.parametrize(
    "line",
    [
        'initd_info{version="1.0",backend="nftables",mode="enforce"} 1',
        "initd_enforcing 1",
        "initd_dns_queries_total 12345678",
        'initd_packets_refused_total{reason="unlisted"} 5',
        'initd_dns_upstream_seconds{quantile="0.5"} 0.0125',
        r'initd_dns_upstream_up{server="1.1.1.1 \"a\\b\n"} 0',
    ],
)
def test_samples(line):
    assert line in metrics.text(STATUS).splitlines()


def test_audit_mode_shows():
    assert "initd_enforcing 0" in metrics.text({**STATUS, "mode": "audit"}).splitlines()
