"""Refusals as events, folded and bounded: what a session sends can neither grow this nor forge a line of it.

A row is everything that was the same: subject, port, protocol, reason and actor. Times are the caller's clock
(seconds since the epoch).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MOST = 1024
"""Rows; the one not seen for longest goes first."""

MINUTE, HOUR = 60, 3600

SUBJECT_LENGTH = 255
"""Characters of a name that are kept: the longest that DNS has (RFC 1035, 2.3.4)."""

COMMAND_LENGTH = 160


@dataclass(frozen=True, slots=True)
class Session:
    """An exec session: its leader's PID and command line, and its terminal ("pts/0"), None without one."""

    leader: int
    tty: str | None
    command: str


@dataclass(frozen=True, slots=True)
class Actor:
    """Who did it, as far as it is certain; None is unknown."""

    uid: int | None = None
    user: str | None = None
    pid: int | None = None
    command: str | None = None
    session: Session | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One refusal, or with `allowed` something that only audit mode let through.

    `kind` is "name" (a question to the DNS guard) or "connection" (a packet). `subject` is the name if one is known,
    else the address. `proto` is tcp, udp, another protocol's number, or the record type of a question; `reason` is
    unlisted, denied (an exception line), special (a special range) or port (listed, but not with this port).
    """

    kind: str
    subject: str
    proto: str
    reason: str
    address: str | None = None
    port: int | None = None
    allowed: bool = False
    actor: Actor = field(default_factory=Actor)


@dataclass(slots=True)
class Row:
    """Events that were the same. `number` grows with every event of the ring: who follows asks for what is above."""

    event: Event
    count: int
    first: float
    last: float
    number: int
    recent: dict[int, int] = field(default_factory=dict)  # minute → events, of the last hour

    def within_hour(self, now: float) -> int:
        """Events of the last hour, to the minute."""
        oldest = (now - HOUR) // MINUTE
        return sum(count for minute, count in self.recent.items() if minute > oldest)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return {
            **asdict(self.event),
            "count": self.count,
            "first": round(self.first, 3),
            "last": round(self.last, 3),
            "number": self.number,
        }


class Ring:
    """The rows, latest last."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._rows: dict[Event, Row] = {}
        self.number = 0
        self.forgotten = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def add(self, event: Event, now: float) -> Row:
        """Count one event."""
        row = self._rows.pop(_key(event), None) or Row(event, 0, now, now, 0)
        self.number += 1
        row.event, row.number, row.last = event, self.number, now
        row.count += 1
        minute = int(now // MINUTE)
        row.recent[minute] = row.recent.get(minute, 0) + 1
        if len(row.recent) > HOUR // MINUTE:
            del row.recent[next(iter(row.recent))]
        self._put(row)
        return row

    def restore(self, rows: Iterable[Row]) -> None:
        """Take up what was written down, oldest first; numbers are given anew."""
        for row in rows:
            self.number += 1
            row.number = self.number
            self._rows.pop(_key(row.event), None)
            self._put(row)

    def after(self, number: int, most: int = MOST) -> list[Row]:
        """At most `most` rows that something happened to after `number`, oldest first."""
        newer: list[Row] = []
        for row in reversed(self._rows.values()):
            if row.number <= number:
                break
            newer.append(row)
        newer.reverse()
        return newer[:most]

    def _put(self, row: Row) -> None:
        self._rows[_key(row.event)] = row
        if len(self._rows) > self._most:
            del self._rows[next(iter(self._rows))]
            self.forgotten += 1


def _key(event: Event) -> Event:
    """What folds: a name's A and AAAA are one matter, and so are a name's addresses."""
    if event.kind == "name" and event.proto in {"A", "AAAA"}:
        return Event("name", event.subject, "A", event.reason, allowed=event.allowed, actor=event.actor)
    address = None if event.address != event.subject else event.address
    return Event(event.kind, event.subject, event.proto, event.reason, address, event.port, event.allowed, event.actor)


def printable(text: str, most: int) -> str:
    r"""`text` on one line and without anything a terminal acts on: \n, \x1b, \u202e; cut after `most` characters.

    A backslash is doubled, so that an escape that somebody typed cannot be taken for one of ours.
    """
    shown = "".join(one if one.isprintable() and one != "\\" else _escaped(one) for one in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _escaped(one: str) -> str:
    return one.encode("unicode_escape", "backslashreplace").decode("ascii")


def from_dict(data: Any) -> Row:
    """`Row.as_dict`, read back. Raises ValueError for anything else; texts are made printable again."""
    try:
        actor = dict(data["actor"])
        if session := actor.pop("session"):
            session = Session(
                int(session["leader"]),
                _text(session["tty"], COMMAND_LENGTH),
                _text(session["command"], COMMAND_LENGTH) or "",
            )
        event = Event(
            kind=_one_of(data["kind"], "name", "connection"),
            subject=_text(data["subject"], SUBJECT_LENGTH) or "",
            proto=_text(data["proto"], 16) or "",
            reason=_text(data["reason"], 16) or "",
            address=_text(data["address"], 64),
            port=_number(data["port"]),
            allowed=data["allowed"] is True,
            actor=Actor(
                uid=_number(actor["uid"]),
                user=_text(actor["user"], 64),
                pid=_number(actor["pid"]),
                command=_text(actor["command"], COMMAND_LENGTH),
                session=session or None,
            ),
        )
        return Row(event, max(int(data["count"]), 1), float(data["first"]), float(data["last"]), 0)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a row: {error!r}") from error


def _one_of(value: Any, *words: str) -> str:
    if value not in words:
        raise ValueError(f"{value!r:.40} is not one of {words}")
    return str(value)


def _text(value: Any, most: int) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > 8 * most or not value.isprintable():
        raise ValueError("not a printable text")
    return value[:most]


def _number(value: Any) -> int | None:
    return None if value is None else int(value)
