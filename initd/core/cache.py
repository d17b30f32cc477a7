"""Answers for as long as their TTL allows, within a bound of bytes; the oldest go first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initd.core.dnsfilter import Judged
    from initd.core.ruleset import IPAddress
    from initd.core.wire import Reply

OVERHEAD = 512
"""Bytes of one entry besides its records, roughly: objects, key, dictionary slot."""

Key = tuple[bytes, int]


class Entry:
    """`reply` until `expires`; from `check` on, or under another `generation`, `learned` must be granted anew.

    `plain` is False when a listed range decided about one of the addresses.
    """

    __slots__ = ("check", "expires", "generation", "judged", "learned", "plain", "reply", "size")

    def __init__(self, reply: Reply, judged: Judged, learned: tuple[IPAddress, ...], expires: float) -> None:
        self.reply = reply
        self.judged = judged
        self.learned = learned
        self.expires = expires
        self.check = 0.0
        self.generation = 0
        self.plain = True
        self.size = OVERHEAD + 2 * reply.size + 64 * len(learned)


class Cache:
    """`limit` in bytes. Reading is `find`, so that the hot path is one dictionary look-up."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: dict[Key, Entry] = {}
        self._size = 0
        self.find = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: Key, entry: Entry) -> None:
        """Keep `entry`, at the expense of the oldest ones when there is no room."""
        self.drop(key)
        while self._entries and self._size + entry.size > self._limit:
            self.drop(next(iter(self._entries)))
        if entry.size <= self._limit:
            self._entries[key] = entry
            self._size += entry.size

    def drop(self, key: Key) -> None:
        """Forget `key`, if it is there."""
        if entry := self._entries.pop(key, None):
            self._size -= entry.size

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._size = 0
