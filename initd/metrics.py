"""The status as Prometheus text (exposition format 0.0.4), base units, for a scrape or a textfile collector. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Sample = tuple[dict[str, str], float]


def text(status: dict[str, Any], *, color: bool = False) -> str:  # noqa: ARG001 - one signature for all
    """All metrics of one status answer."""
    return "\n".join(line for family in _families(status) for line in _rendered(*family))


def _families(status: dict[str, Any]) -> Iterator[tuple[str, str, str, Iterable[Sample]]]:
    guard, refusals = status["guard"], status["refusals"]
    labels = {key: str(status[key]) for key in ("version", "backend", "mode")}
    yield "initd_info", "gauge", "Version, backend and mode.", [(labels, 1)]
    yield "initd_ready", "gauge", "1 when armed and dropped.", _one(status["ready"])
    enforcing = status["mode"] == "enforce"
    yield "initd_enforcing", "gauge", "0 while audit mode lets the unlisted through.", _one(enforcing)
    yield "initd_warden_uptime_seconds", "gauge", "Time since the warden started.", _one(status["uptime"])
    yield "initd_warden_starts_total", "counter", "Starts of the warden.", _one(status["generation"])
    kinds = ("names", "wildcards", "ranges", "feeds", "exceptions")
    sizes = [({"kind": kind}, status["policy"][kind]) for kind in kinds]
    yield "initd_policy_entries", "gauge", "Entries of the policy in force.", sizes
    held = [({"set": name}, count) for name, count in status["rules"].items()]
    yield "initd_set_elements", "gauge", "Elements in the kernel's sets.", held
    packets = [({"reason": reason}, count) for reason, count in status["refused"].items()]
    yield "initd_packets_refused_total", "counter", "Packets refused since the rules were made.", packets
    yield "initd_refusals_last_hour", "gauge", "Refusals recorded in the last hour.", _one(refusals["hour"])
    yield "initd_refusal_reports_lost_total", "counter", "Logged packets lost on the way.", _one(refusals["lost"])
    for key, name, words in (
        ("queries", "queries", "Questions to the DNS guard."),
        ("from_cache", "cache_hits", "Questions answered from the cache."),
        ("forwarded", "forwarded", "Questions asked upstream."),
        ("refused", "refused", "Questions refused."),
        ("failed", "failed", "Questions no upstream answered."),
        ("malformed", "malformed", "Messages that were no questions."),
        ("insert_failures", "insert_failures", "Answers withheld because the kernel did not take an address."),
    ):
        yield f"initd_dns_{name}_total", "counter", words, _one(guard[key])
    yield "initd_dns_leases", "gauge", "Addresses that may be reached because a name led there.", _one(guard["leases"])
    latency = [({"quantile": q}, guard[key] / 1000) for q, key in (("0.5", "upstream_p50"), ("0.99", "upstream_p99"))]
    yield "initd_dns_upstream_seconds", "gauge", "Latency of the latest upstream answers.", latency
    ailing = [({"server": one["server"]}, float(not one["ailing"])) for one in guard["upstreams"]]
    yield "initd_dns_upstream_up", "gauge", "1 for a resolver that answers.", ailing
    yield "initd_warnings", "gauge", "Warnings that `fwctl status` shows.", _one(len(status["warnings"]))


def _one(value: float) -> list[Sample]:
    return [({}, float(value))]


def _rendered(name: str, kind: str, words: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield f"# HELP {name} {words}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"{name}{{{inner}}} {value:.15g}" if inner else f"{name} {value:.15g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
