from __future__ import annotations

import pytest

from initd.core.grammar import FaultError, parse_entry
from initd.core.policy import DEFAULT_POLICY, DEFAULT_SERVICES, Feed, NameRule, Origin, Service, parse
from initd.core.presets import PRESETS
from initd.core.suffixes import REGISTRY, SHARED, TOP_LEVEL, is_shared, is_top_level

ORIGIN = Origin(1, "test")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_is_made_of_good_names_in_canonical_text(name):
    preset = PRESETS[name]
    assert preset.summary
    assert len(set(preset.entries)) == len(preset.entries)
    for entry in preset.entries:
        (rule,) = parse_entry(entry, ORIGIN)
        assert isinstance(rule, NameRule)
        assert rule.services <= DEFAULT_SERVICES
    assert preset.entries or preset.feed


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_rule_of_a_preset_names_the_line_and_the_preset(name):
    policy = parse(f"\n@{name}")
    rules = [*policy.names, *policy.feeds]
    assert rules
    assert {rule.origin for rule in rules} == {Origin(2, f"@{name}", name)}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_ports_after_a_preset_replace_all_of_its_services(name):
    policy = parse(f"@{name}:53,8443/udp")
    expected = {Service("udp", 53), Service("udp", 8443)}
    assert {rule.services for rule in (*policy.names, *policy.feeds)} == {frozenset(expected)}


def test_the_feeds_are_the_presets_that_say_so():
    assert {name for name, preset in PRESETS.items() if preset.feed} == {feed.value for feed in Feed}


def test_the_presets_are_the_documented_ones():
    assert set(PRESETS) == {"github", "anthropic", "npm", "pypi", "debian", "vscode", "host", "subnet"}


def test_git_over_ssh_is_in_github_and_nowhere_else():
    ssh = Service("tcp", 22)
    for name in PRESETS:
        rules = [rule for rule in parse(f"@{name}").names if ssh in rule.services]
        assert bool(rules) == (name == "github")


def test_defaults_are_one_entry_a_line():
    assert DEFAULT_POLICY.split("\n") == [
        "@github",
        "@npm",
        "@anthropic",
        "sentry.io",
        "statsig.anthropic.com",
        "statsig.com",
        "",
    ]


@pytest.mark.parametrize("suffix", sorted(SHARED | REGISTRY))
def test_no_wildcard_on_a_suffix_that_strangers_share(suffix):
    with pytest.raises(FaultError, match="public suffix"):
        parse_entry(f"*.{suffix}", ORIGIN)
    parse_entry(f"*.mine.{suffix}", ORIGIN)


@pytest.mark.parametrize("suffix", sorted(SHARED))
def test_a_shared_suffix_itself_may_be_listed(suffix):
    parse_entry(suffix, ORIGIN)


@pytest.mark.parametrize("name", sorted(TOP_LEVEL | REGISTRY))
def test_no_host_is_called_like_a_registry(name):
    assert is_top_level(name)
    with pytest.raises(FaultError, match="public suffix"):
        parse_entry(name, ORIGIN)
    parse_entry(f"mine.{name}", ORIGIN)


@pytest.mark.parametrize("name", ["registry", "db", "ai", "localhost", "example.com", "github.io"])
def test_compose_services_and_ordinary_names_are_hosts(name):
    parse_entry(name, ORIGIN)


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("us-east-1.amazonaws.com", True),
        ("s3.us-gov-west-1.amazonaws.com", True),
        ("s3-eu-west-1.amazonaws.com", True),
        ("s3.dualstack.eu-central-1.amazonaws.com", True),
        ("cn-north-1.amazonaws.com.cn", True),
        ("lambda-url.eu-west-1.on.aws", True),
        ("bucket.s3.amazonaws.com", False),
        ("bucket.s3.eu-central-1.amazonaws.com", False),
        ("abc123.execute-api.us-east-1.amazonaws.com", False),
        ("amazonaws.com.evil.test", False),
        ("notamazonaws.com", False),
        ("example.co.uk", False),
        ("com", True),
        ("internal", True),
    ],
)
def test_regions_of_a_cloud_are_shared_and_what_somebody_owns_is_not(name, shared):
    assert is_shared(name) is shared
