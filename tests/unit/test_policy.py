from __future__ import annotations

import contextlib
import itertools
import time
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from initd.core import policy as language
from initd.core.policy import DEFAULT_SERVICES, Feed, Origin, PolicyError, Service, Verdict, parse

CASES = Path(__file__).parents[1] / "cases" / "policy"
HTTPS = Service("tcp", 443)


# ---- transcripts: tests/cases/policy/NAME.txt gives NAME.ok (canonical text) or NAME.err (every error line)


@pytest.mark.parametrize("case", sorted(CASES.glob("*.txt")), ids=lambda path: path.stem)
def test_case(case):
    try:
        seen, golden = language.dump(parse(language.decode(case.read_bytes()))), case.with_suffix(".ok")
    except PolicyError as error:
        seen, golden = f"initd: {error}\n", case.with_suffix(".err")
    assert seen == golden.read_text(encoding="utf-8")


def test_every_golden_has_its_case():
    goldens = [*CASES.glob("*.ok"), *CASES.glob("*.err")]
    assert len(goldens) == len(list(CASES.glob("*.txt"))) > 20
    assert all(golden.with_suffix(".txt").exists() for golden in goldens)


@pytest.mark.parametrize(
    "case", sorted({*CASES.glob("*-bad.txt")} - {CASES / "crlf-bad.txt"}), ids=lambda path: path.stem
)
def test_each_bad_line_is_bad_by_itself(case):
    """A bad line must not hide behind another: alone in a file it gives the same reason."""
    with pytest.raises(PolicyError) as together:
        parse(language.decode(case.read_bytes()))
    lines = case.read_bytes().decode("utf-8-sig").split("\n")
    for issue in together.value.issues:
        with pytest.raises(PolicyError) as alone:
            parse(lines[issue.line - 1])
        assert [(one.column, one.reason, one.hint) for one in alone.value.issues] == [
            (issue.column, issue.reason, issue.hint)
        ]


def test_hints_that_suggest_an_entry_suggest_a_good_one():
    """What we tell people to write must not be refused in turn."""
    suggested = 0
    for case in CASES.glob("*.err"):
        for line in case.read_text(encoding="utf-8").splitlines():
            if line.startswith("hint: did you mean ") and "fe80::1%" not in line:
                for entry in line.removeprefix("hint: did you mean ").removesuffix("?").split(" or "):
                    parse(entry)
                    suggested += 1
    assert suggested > 40


# ---- errors


def test_error_text_and_exit_code():
    with pytest.raises(PolicyError) as caught:
        parse("github.com\n  *.co.uk\n", file="/etc/list.txt")
    assert caught.value.code == 78
    assert str(caught.value) == (
        "/etc/list.txt:2:3: '*.co.uk' is a public suffix\nhint: list the names below it that you need"
    )
    assert caught.value.issues == (
        language.Issue("/etc/list.txt", 2, 3, "'*.co.uk' is a public suffix", "list the names below it that you need"),
    )


def test_a_wrong_file_does_not_flood_the_terminal_but_every_issue_is_there():
    with pytest.raises(PolicyError) as caught:
        parse("a b\n" * 5000)
    assert len(caught.value.issues) == 5000
    assert str(caught.value).splitlines()[-1] == "allowed-domains.txt: and 4900 more bad lines"
    assert len(str(caught.value)) < 32_000


def test_control_characters_never_reach_the_terminal():
    with pytest.raises(PolicyError) as caught:
        parse("a\x1b[2J.com\nb\u202ecom\n*\x07.com\n")
    text = str(caught.value)
    assert len(caught.value.issues) == 3
    assert all(character.isprintable() or character == "\n" for character in text)


# ---- decode


def test_decode_limits():
    limit = b"#" * language.MAX_BYTES
    assert language.decode(limit) == limit.decode()
    with pytest.raises(PolicyError, match="larger than 1 MiB"):
        language.decode(limit + b"#")
    assert language.decode(b"\n" * language.MAX_LINES).count("\n") == language.MAX_LINES
    assert language.decode(b"a\n" * language.MAX_LINES)
    with pytest.raises(PolicyError, match="more than 100000 lines"):
        language.decode(b"a\n" * language.MAX_LINES + b"a")


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_decode_or_say_where(raw):
    try:
        language.decode(raw)
    except PolicyError as error:
        (issue,) = error.issues
        assert issue.line >= 1
        assert issue.column >= 1


@settings(deadline=None)
@given(st.text(max_size=80).filter(lambda text: "\0" not in text and not text.startswith("\ufeff")))
def test_decode_is_utf8(text):
    assert language.decode(text.encode()) == text
    assert language.decode(b"\xef\xbb\xbf" + text.encode()) == text


# ---- any text

PIECES = st.sampled_from(
    [
        *"abz019.:,/*@![]#%-_ \t\r\n",
        "::",
        "github",
        ".com",
        "@host",
        "10.0.0.0",
        "/8",
        ":443",
        "/udp",
        "xn--",
        "*.",
        "ß",
    ]
)
LINES = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map("".join))
WORDS = [line for case in CASES.glob("*.txt") for line in case.read_bytes().decode("utf-8", "replace").splitlines()]


@settings(deadline=None)
@given(st.lists(st.one_of(LINES, st.sampled_from(WORDS)), max_size=6).map("\n".join))
def test_any_text_is_a_policy_or_an_error_that_points_into_it(text):
    lines = text.removeprefix("\ufeff").split("\n")
    try:
        policy, issues = parse(text), ()
    except PolicyError as error:
        policy, issues = None, error.issues
    assert (policy is None) == bool(issues)
    assert [issue.line for issue in issues] == sorted({issue.line for issue in issues})
    for issue in issues:
        assert 1 <= issue.column <= len(lines[issue.line - 1])
        assert issue.reason
    if policy is not None:
        assert_same(parse(language.dump(policy)), policy)


def assert_same(one: language.Policy, other: language.Policy) -> None:
    """Equivalent: neither has an entry that the other has not, and neither lets through more."""
    assert language.changes(one, other) == language.PolicyChange((), ())
    assert language.widens(one, other) == language.widens(other, one) == ()
    assert language.dump(one) == language.dump(other)


# ---- a model to compare with: small names, so that they meet

NAME = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda labels: ".".join([*labels, "test"]))
PORTS = st.sampled_from(["", ":443", ":443,8443", ":53/udp", ":22,80,443"])
ENTRY = st.one_of(
    st.builds("{}{}".format, NAME, PORTS),
    st.builds("*.{}{}".format, NAME, PORTS),
    st.builds("!{}".format, NAME),
    st.builds("!*.{}".format, NAME),
)
RANGE = st.builds("192.0.2.{}/{}{}".format, st.sampled_from([0, 64, 128, 192]), st.sampled_from([26, 27, 32]), PORTS)
SIX = st.builds("[2001:db8:{}::/{}]{}".format, st.sampled_from("01ac"), st.sampled_from([48, 64, 128]), PORTS)
POLICY = st.lists(ENTRY, max_size=6).map(lambda lines: parse("\n".join(lines)))
ANYTHING = st.lists(
    st.one_of(ENTRY, RANGE, SIX, st.sampled_from(["@github", "@github:8443", "@host:5432", "@host", "@npm", "@npm:1"])),
    max_size=8,
).map(lambda lines: parse("\n".join(lines)))
PROBES = [".".join([*labels, "test"]) for count in range(5) for labels in itertools.product("abcz", repeat=count)] + [
    "a.b.c.a.b.c.test",
    "c.test",
    "c.c.test",
    "z.c.c.test",
    "c.c.c.test",
    "test",
    "other",
    "a.b",
    "",
]


def below(name: str, ancestor: str) -> bool:
    return name.endswith(f".{ancestor}")


def model(policy: language.Policy, name: str) -> tuple[Verdict, frozenset[Service], bool]:
    """`decide` as the documentation says it, rule by rule."""
    if any(below(name, one.name) or (name == one.name and not one.wildcard) for one in policy.denials):
        return Verdict.DENIED, frozenset(), False
    literal = [rule for rule in policy.names if not rule.wildcard and rule.name == name]
    wild = [rule for rule in policy.names if rule.wildcard and below(name, rule.name)]
    if literal or wild:
        return Verdict.LISTED, frozenset().union(*(rule.services for rule in literal + wild)), bool(literal)
    listed_below = any(
        below(rule.name, name) or name == "" or (rule.wildcard and rule.name == name)
        for rule in policy.names
        if not any(
            below(rule.name, one.name) or (rule.name == one.name and (rule.wildcard or not one.wildcard))
            for one in policy.denials
        )
    )
    return (Verdict.PARENT if listed_below else Verdict.UNLISTED), frozenset(), False


@settings(deadline=None)
@given(POLICY)
def test_decide_is_the_model(policy):
    lookup = policy.lookup()
    for name in PROBES:
        decision = lookup.decide(name)
        assert (decision.verdict, decision.services, decision.literal) == model(policy, name), name


@settings(deadline=None)
@given(POLICY, POLICY)
def test_widens_is_exact_for_names(old, new):
    before, after = old.lookup(), new.lookup()
    wider = any(after.decide(name).services - before.decide(name).services for name in PROBES)
    assert bool(language.widens(old, new)) == wider


@settings(deadline=None)
@given(ANYTHING)
def test_dump_round_trips(policy):
    assert_same(parse(language.dump(policy)), policy)


@settings(deadline=None)
@given(ANYTHING, ANYTHING)
def test_changes_are_entries_and_lead_from_old_to_new(old, new):
    change = language.changes(old, new)
    assert list(change.added) == sorted(set(change.added))
    for line in (*change.added, *change.removed):
        parse(line)
    if change == language.PolicyChange((), ()):
        assert language.widens(old, new) == ()
    if not new.denials and not old.denials:
        both = parse(language.dump(old) + language.dump(new))
        assert language.widens(both, old) == language.widens(both, new) == ()


# ---- single decisions, as a person would try them


def decide(text: str, name: str):
    return parse(text).lookup().decide(name)


def test_bare_name_has_the_default_services():
    assert {(one.proto, one.port) for one in DEFAULT_SERVICES} == {("tcp", 22), ("tcp", 80), ("tcp", 443)}
    decision = decide("github.com", "github.com")
    assert (decision.verdict, decision.services, decision.literal) == (Verdict.LISTED, DEFAULT_SERVICES, True)


def test_wildcard_covers_names_below_at_any_depth_and_not_itself():
    assert decide("*.example.org", "a.example.org").verdict is Verdict.LISTED
    assert decide("*.example.org", "a.b.c.example.org").verdict is Verdict.LISTED
    assert decide("*.example.org", "example.org").verdict is Verdict.PARENT
    assert decide("*.example.org", "badexample.org").verdict is Verdict.UNLISTED
    assert decide("*.example.org", "example.org.evil.test").verdict is Verdict.UNLISTED


def test_literal_and_wildcard_services_are_united_and_both_lines_named():
    decision = decide("*.example.org:443\na.example.org:5000\n*.org.test\n", "a.example.org")
    assert decision.services == {Service("tcp", 443), Service("tcp", 5000)}
    assert decision.origins == (Origin(2, "a.example.org:5000"), Origin(1, "*.example.org:443"))
    assert decision.literal


def test_parents_up_to_the_root():
    for parent in ("example.com", "com", ""):
        assert decide("api.example.com", parent).verdict is Verdict.PARENT
    assert decide("api.example.com", "www.example.com").verdict is Verdict.UNLISTED
    assert decide("api.example.com", "x.api.example.com").verdict is Verdict.UNLISTED


def test_parent_of_something_denied_alone_is_unlisted():
    assert decide("api.example.com\n!api.example.com", "example.com").verdict is Verdict.UNLISTED
    assert decide("*.example.com\n!*.example.com", "com").verdict is Verdict.UNLISTED
    assert decide("api.example.com\nb.example.com\n!api.example.com", "example.com").verdict is Verdict.PARENT


def test_exception_wins_over_every_line_and_covers_names_below():
    text = "gist.github.com\n@github\n!gist.github.com\n"
    for name in ("gist.github.com", "x.gist.github.com"):
        decision = decide(text, name)
        assert (decision.verdict, decision.services) == (Verdict.DENIED, frozenset())
        assert decision.origins == (Origin(3, "!gist.github.com"),)
    assert decide(text, "api.github.com").verdict is Verdict.LISTED
    assert decide(text, "notgist.github.com").verdict is Verdict.LISTED


def test_wildcard_exception_leaves_the_name_itself():
    text = "*.example.org\nexample.org\n!*.example.org\n"
    assert decide(text, "example.org").verdict is Verdict.LISTED
    assert decide(text, "a.example.org").verdict is Verdict.DENIED


def test_a_listed_name_below_an_exception_stays_denied():
    assert decide("a.b.example.org\n!b.example.org", "a.b.example.org").verdict is Verdict.DENIED


def test_repeated_lines_are_kept_once_and_all_named():
    policy = parse("github.com\nGitHub.com.\ngithub.com:80,443,22\n@github\n")
    assert [rule.origin.line for rule in policy.names if rule.name == "github.com" and not rule.wildcard] == [1]
    assert policy.lookup().decide("github.com").origins == (
        Origin(1, "github.com"),
        Origin(2, "GitHub.com."),
        Origin(3, "github.com:80,443,22"),
        Origin(4, "@github", "github"),
    )


def test_a_preset_says_where_it_comes_from():
    policy = parse("# header\n@host:5432\n")
    (rule,) = policy.feeds
    assert (rule.feed, rule.services, rule.origin) == (
        Feed.HOST,
        {Service("tcp", 5432)},
        Origin(2, "@host:5432", "host"),
    )


def test_everything_is_sorted_whatever_the_order_of_the_file():
    lines = ["b.test", "*.a.test", "a.test:443", "10.0.0.0/8", "9.0.0.0/8", "2001:db8::/32", "!z.test", "!y.test"]
    forward, backward = parse("\n".join(lines)), parse("\n".join(reversed(lines)))
    assert [rule.name for rule in forward.names] == ["a.test", "a.test", "b.test"]
    assert [str(rule.network) for rule in forward.ranges] == ["9.0.0.0/8", "10.0.0.0/8", "2001:db8::/32"]
    assert [rule.name for rule in forward.denials] == ["y.test", "z.test"]
    assert [(r.name, r.wildcard) for r in forward.names] == [(r.name, r.wildcard) for r in backward.names]
    assert language.dump(forward) == language.dump(backward)


def test_decide_address():
    lookup = parse(
        "192.0.2.0/24:443\n192.0.2.7\n2001:db8::/32:53/udp\n".replace("2001:db8::/32", "[2001:db8::/32]")
    ).lookup()

    def lines(address, service):
        return [origin.line for origin in lookup.decide_address(ip_address(address), service)]

    assert lines("192.0.2.7", HTTPS) == [1, 2]
    assert lines("192.0.2.7", Service("tcp", 22)) == [2]
    assert lines("192.0.2.8", Service("tcp", 22)) == []
    assert lines("192.0.2.8", Service("udp", 443)) == []
    assert lines("198.51.100.1", HTTPS) == []
    assert lines("2001:db8::5", Service("udp", 53)) == [3]
    assert lines("::ffff:192.0.2.7", Service("tcp", 22)) == [2]


# ---- reloads: what counts as wider


@pytest.mark.parametrize(
    ("old", "new", "wider"),
    [
        ("a.test", "a.test", ()),
        ("a.test", "", ()),
        ("", "a.test", ("a.test",)),
        ("a.test:443", "a.test:443,8443", ("a.test:8443",)),
        ("a.test", "a.test:443", ()),
        ("a.test:443", "a.test:443/udp", ("a.test:443/udp",)),
        ("*.a.test", "x.a.test\ny.z.a.test:443", ()),
        ("*.a.test:443", "x.a.test", ("x.a.test:22,80",)),
        ("*.a.test", "*.b.a.test", ()),
        ("*.b.a.test", "*.a.test", ("*.a.test", "b.a.test")),
        ("x.a.test", "*.a.test", ("*.a.test", "*.x.a.test")),
        ("*.a.test", "a.test", ("a.test",)),
        # Exceptions
        ("*.a.test\n!x.a.test", "*.a.test", ("*.x.a.test", "x.a.test")),
        ("*.a.test\n!x.a.test", "*.a.test\n!*.x.a.test", ("x.a.test",)),
        ("*.a.test\n!*.x.a.test", "*.a.test\n!x.a.test", ()),
        ("*.a.test\n!x.a.test", "*.a.test\n!y.x.a.test\n!x.a.test", ()),
        ("*.a.test\n!x.a.test", "*.a.test\n!y.x.a.test", ("*.x.a.test", "x.a.test")),
        ("*.a.test\n!x.a.test", "*.a.test\n!*.a.test", ()),
        ("*.a.test\n!x.a.test", "y.a.test", ()),
        ("*.a.test\n!x.a.test", "x.a.test", ("x.a.test",)),
        ("!x.test", "", ()),
        ("", "!x.test", ()),
        ("@github\n!gist.github.com", "@github", ("*.gist.github.com", "gist.github.com")),
        # Ranges
        ("192.0.2.0/24", "192.0.2.7\n192.0.2.64/26:443", ()),
        ("192.0.2.0/24:443", "192.0.2.7", ("192.0.2.7:22,80",)),
        ("192.0.2.0/25\n192.0.2.128/25", "192.0.2.0/24", ()),
        ("192.0.2.0/25", "192.0.2.0/24", ("192.0.2.0/24",)),
        ("2001:db8::/48", "2001:db8::/47", ("[2001:db8::/47]",)),
        ("2001:db8::/32", "2001:db8:1::/48", ()),
        ("0:0:0:0:0:0:c000:200/120", "192.0.2.0/24", ("192.0.2.0/24",)),
        # Feeds
        ("@host", "@host:443", ()),
        ("@host:443", "@host", ("@host:22,80",)),
        ("@host", "@subnet", ("@subnet",)),
        ("@host", "@host:5432", ("@host:5432",)),
    ],
)
def test_widens(old, new, wider):
    assert language.widens(parse(old), parse(new)) == wider


def test_changes_are_canonical_and_show_single_ports():
    change = language.changes(
        parse("a.test:443\n@host\n192.0.2.1\n!x.test"), parse("A.TEST:443,8443\n@host:22,80,443\nb.test:80,22,443")
    )
    assert change == language.PolicyChange(added=("a.test:8443", "b.test"), removed=("!x.test", "192.0.2.1"))


def test_default_policy_parses_and_lists_what_the_design_says():
    policy = parse(language.DEFAULT_POLICY)
    lookup = policy.lookup()
    for name in ("github.com", "api.github.com", "registry.npmjs.org", "api.anthropic.com", "sentry.io", "statsig.com"):
        assert HTTPS in lookup.decide(name).services
    assert lookup.decide("statsig.anthropic.com").verdict is Verdict.LISTED
    assert lookup.decide("example.com").verdict is Verdict.UNLISTED
    assert [rule.feed for rule in policy.feeds] == [Feed.GITHUB]
    assert not policy.ranges


def test_quickstart_example_parses():
    path = Path(__file__).parents[2] / "examples" / "quickstart" / "allowed-domains.txt"
    lookup = parse(language.decode(path.read_bytes())).lookup()
    assert HTTPS in lookup.decide("api.anthropic.com").services


def test_dump_keeps_the_ports_of_a_preset_apart():
    """Four ports after one `@github` would open SSH on names that have 443 and 8443 alone."""
    policy = parse("@github\n@github:8443")
    again = parse(language.dump(policy))
    assert_same(again, policy)
    assert Service("tcp", 22) not in again.lookup().decide("raw.githubusercontent.com").services


def test_networks_are_exact():
    (rule,) = parse("[2001:DB8:0::/32]:443/udp").ranges
    assert (rule.network, rule.services) == (ip_network("2001:db8::/32"), {Service("udp", 443)})


COSTLY = {
    "digits": lambda: parse("1" * 300_000 + "x"),
    "dots": lambda: parse("." * 300_000 + "x"),
    "an endless name": lambda: parse("a." * 300_000),
    "unknown presets": lambda: parse("@githuX\n" * 20_000),
    "ports times ranges": lambda: language.widens(parse("192.0.2.1"), MANY),
}
MANY = parse(
    "10.0.0.0/8:"
    + ",".join(map(str, range(1, 20_000)))
    + "".join(f"\n10.{n >> 8}.{n & 255}.0/24" for n in range(10_000))
)


@pytest.mark.parametrize("name", COSTLY)
def test_nothing_that_fits_in_a_file_takes_long(name):
    """A session that may write the file may also have it read."""
    begin = time.process_time()
    with contextlib.suppress(PolicyError):
        COSTLY[name]()
    assert time.process_time() - begin < 5.0, "it was minutes to hours"
