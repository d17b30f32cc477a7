"""Refusals are folded, bounded and printable, whatever a session sends."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from initd.core.events import HOUR, MINUTE, Actor, Event, Ring, Session, from_dict, printable

ALICE = Actor(501, "claude", 7, "curl https://evil.test", Session(3, "pts/0", "bash"))


def question(name: str = "evil.test", kind: str = "A", **more) -> Event:
    return Event("name", name, kind, "unlisted", **more)


def connection(address: str, port: int = 443, **more) -> Event:
    return Event("connection", more.pop("name", address), "tcp", "unlisted", address, port, **more)


def test_the_same_is_one_row_with_a_count():
    ring = Ring()
    for now in (100.0, 200.0, 300.0):
        row = ring.add(question(actor=ALICE), now)
    assert (len(ring), row.count, row.first, row.last, row.number) == (1, 3, 100.0, 300.0, 3)


@pytest.mark.parametrize(
    ("one", "other", "rows"),
    [
        (question(kind="A"), question(kind="AAAA"), 1),
        (question(kind="A"), question(kind="TXT"), 2),
        (question(), question("other.test"), 2),
        (question(), question(actor=ALICE), 2),
        (question(), question(allowed=True), 2),
        (connection("203.0.113.1"), connection("203.0.113.1"), 1),
        (connection("203.0.113.1"), connection("203.0.113.1", 80), 2),
        (connection("203.0.113.1"), connection("203.0.113.2"), 2),
        (connection("203.0.113.1", name="a.test"), connection("203.0.113.2", name="a.test"), 1),
    ],
)
def test_what_folds(one, other, rows):
    ring = Ring()
    ring.add(one, 1.0)
    ring.add(other, 2.0)
    assert len(ring) == rows


def test_it_never_grows_beyond_its_bound_and_says_what_it_forgot():
    ring = Ring(most=10)
    for number in range(1000):
        ring.add(question(f"n{number}.test"), float(number))
    assert (len(ring), ring.forgotten) == (10, 990)
    assert [row.event.subject for row in ring] == [f"n{number}.test" for number in range(990, 1000)]


def test_what_is_after_a_number():
    ring = Ring()
    for name in ("a", "b", "c", "a"):
        ring.add(question(name), 1.0)
    assert [(row.event.subject, row.number) for row in ring.after(0)] == [("b", 2), ("c", 3), ("a", 4)]
    assert [row.event.subject for row in ring.after(3)] == ["a"]
    assert ring.after(4) == []
    assert len(ring.after(0, most=2)) == 2


def test_the_last_hour_is_counted_to_the_minute_and_in_bounded_space():
    ring = Ring()
    for minute in range(600):
        row = ring.add(question(), minute * MINUTE)
    assert len(row.recent) == 60
    assert row.within_hour(599 * MINUTE) == 60
    assert row.within_hour(599 * MINUTE + HOUR / 2) == 30
    assert row.within_hour(599 * MINUTE + 2 * HOUR) == 0


@given(st.text(max_size=300))
def test_nothing_printable_can_end_a_line_or_move_a_cursor(text: str):
    shown = printable(text, 100)
    assert shown.isprintable()
    assert len(shown) <= 100


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\\n", r"\\n"),
        ("\u202eevil", r"\u202eevil"),
        ("ü", "ü"),
        ("\x9b31m", r"\x9b31m"),
    ],
)
def test_escapes(text, shown):
    assert printable(text, 100) == shown


@given(
    st.builds(
        question,
        st.text("abc.-", min_size=1, max_size=20),
        st.sampled_from(["A", "TXT"]),
        actor=st.sampled_from([ALICE, Actor(), Actor(0)]),
        allowed=st.booleans(),
    )
)
def test_rows_survive_being_written_down(event):
    row = Ring().add(event, 12.5)
    again = from_dict(json.loads(json.dumps(row.as_dict())))
    assert (again.event, again.count, again.first, again.last) == (row.event, 1, 12.5, 12.5)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "rumour"}, {"subject": "a\nb"}, {"subject": "\x1b[2J"}, {"subject": 7}, {"actor": None}, {"port": "x"},
        {"count": None}, {"actor": {"uid": 1}}, {"subject": "x" * 100_000},
    ],
)  # fmt: skip
def test_what_is_not_a_row_is_refused(change):
    good = Ring().add(question(actor=ALICE), 1.0).as_dict()
    from_dict(good)
    with pytest.raises(ValueError):
        from_dict(good | change)
    with pytest.raises(ValueError):
        from_dict([good])
