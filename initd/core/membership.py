"""Whether a set of elements holds one destination: the kernel's question, asked in user space."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from initd.core.ruleset import Element, IPAddress


class Membership:
    """Answers "is this destination held" for a set of elements in one lookup per prefix length."""

    def __init__(self, elements: Iterable[Element]) -> None:
        self._held: set[tuple[int, int, int, str, int]] = set()
        lengths: defaultdict[int, set[int]] = defaultdict(set)
        for network, proto, port in elements:
            lengths[network.version].add(network.prefixlen)
            self._held.add((network.version, int(network.network_address), network.prefixlen, proto, port))
        self._lengths = {version: sorted(found, reverse=True) for version, found in lengths.items()}

    def holds(self, address: IPAddress, proto: str, port: int) -> bool:
        """Whether any element covers `address` with this protocol and port."""
        number, width = int(address), address.max_prefixlen
        return any(
            (address.version, number >> (width - length) << (width - length), length, proto, port) in self._held
            for length in self._lengths.get(address.version, ())
        )
