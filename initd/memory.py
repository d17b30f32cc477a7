"""Runs: warden. What is in force, written down: for people (`/run/initd`), and for the next start (`/var/lib/initd`).

TOML by tomli-w, replaced atomically (write, rename), readable by all: it holds nothing that a session may not know.
A document that cannot be read back is ignored with a reason, never trusted in part.
"""

from __future__ import annotations

import time
import tomllib
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import tomli_w

from initd.core.policy import Feed

if TYPE_CHECKING:
    from pathlib import Path

    from initd.core.ruleset import IPNetwork
    from initd.live import Live

FILE = "state.toml"
FORMAT = 1
LIMIT = 64 << 20
"""Bytes. A session can have `core.leases.WILD_MOST` leases of the longest names, 21 MB; and a warden that cannot read
what was in force would take the policy from its file."""


@dataclass(frozen=True, slots=True)
class State:
    """The policy in force as text, where it came from, the feeds' ranges, the upstream resolvers and the leases.

    `saved` is seconds since the epoch, leases are name → address → remaining seconds at that time.
    """

    policy: str
    source: str
    saved: float
    upstreams: tuple[str, ...] = ()
    feeds: dict[Feed, tuple[IPNetwork, ...]] = field(default_factory=dict)
    leases: dict[str, Any] = field(default_factory=dict)

    def age(self, now: float) -> float:
        """Seconds since it was saved; never negative, whatever the clock did."""
        return max(now - self.saved, 0.0)


def remember(live: Live, *, now: float) -> State:
    """What is in force now, as a document."""
    return State(
        policy=live.in_force.loaded.text,
        source=live.in_force.loaded.source,
        saved=now,
        upstreams=tuple(str(one.address) for one in sorted(live.upstreams)),
        feeds=dict(live.feeds),
        leases=live.parts.guard.leases.to_state(time.monotonic()),
    )


def dump(state: State) -> str:
    """The document that `load` makes an equal state of."""
    document = {
        "format": FORMAT,
        "saved": state.saved,
        "source": state.source,
        "upstreams": list(state.upstreams),
        "policy": state.policy,
        "feeds": {feed.value: [str(network) for network in networks] for feed, networks in state.feeds.items()},
        "leases": state.leases,
    }
    return tomli_w.dumps(document, multiline_strings=True)


def load(path: Path) -> State | None:
    """The document at `path`; None when there is none. Raises ValueError when it is not one of ours."""
    try:
        with path.open("rb") as file:
            raw = file.read(LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if len(raw) > LIMIT:
        raise ValueError(f"larger than {LIMIT} bytes")
    try:
        data = tomllib.loads(raw.decode())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r} is not {FORMAT}")
        return State(
            policy=_typed(data, "policy", str),
            source=_typed(data, "source", str),
            saved=float(data["saved"]),
            upstreams=tuple(map(str, data["upstreams"])),
            feeds={Feed(key): tuple(map(ip_network, texts)) for key, texts in _typed(data, "feeds", dict).items()},
            leases=_typed(data, "leases", dict),
        )
    except (KeyError, TypeError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"not a state document: {error}") from error


def _typed(data: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(data[key], kind):
        raise TypeError(f"{key} is not a {kind.__name__}")
    return data[key]
