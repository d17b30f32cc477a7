"""Two listings compared, in lines a person can act on. Pure."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from initd.core.ruleset import Element

SHOWN = 5
"""Elements of a set that are spelled out; the rest is a number."""


class Listed(Protocol):
    """What `initd.kernel.base.Listing` has; core does not import the kernel's side."""

    @property
    def rules(self) -> Mapping[str, tuple[str, ...]]:
        """Chain label → rules."""

    @property
    def sets(self) -> Mapping[str, frozenset[Element]]:
        """Set name → elements."""

    @property
    def learned(self) -> frozenset[str]:
        """Names of the learned sets that are there."""


def difference(expected: Listed, actual: Listed) -> tuple[str, ...]:
    """One line for each way in which `actual` is not `expected`; nothing when they are equal."""
    lines: list[str] = []
    for chain in sorted(expected.rules.keys() | actual.rules.keys()):
        lines += _chain(chain, expected.rules.get(chain), actual.rules.get(chain))
    for name in sorted(expected.sets.keys() | actual.sets.keys()):
        lines += _set(name, expected.sets.get(name), actual.sets.get(name))
    lines += [f"set {name}: missing, or not as it must be" for name in sorted(expected.learned - actual.learned)]
    lines += [f"set {name}: unexpected" for name in sorted(actual.learned - expected.learned)]
    return tuple(lines)


def _chain(chain: str, expected: tuple[str, ...] | None, actual: tuple[str, ...] | None) -> Iterator[str]:
    if expected == actual:
        return
    if actual is None:
        yield f"{chain}: chain missing, or nothing leads to it"
        return
    if expected is None:
        yield f"{chain}: unexpected chain of {len(actual)} rules"
        return
    if sorted(expected) == sorted(actual):
        first = next(index for index, (a, b) in enumerate(zip(expected, actual, strict=True)) if a != b)
        yield f"{chain}: out of order from rule {first + 1}: {actual[first]}"
        return
    for verb, start, stop, other, last in SequenceMatcher(None, expected, actual, autojunk=False).get_opcodes():
        if verb != "equal":
            yield from (f"{chain}: missing at {index + 1}: {expected[index]}" for index in range(start, stop))
            yield from (f"{chain}: unexpected at {index + 1}: {actual[index]}" for index in range(other, last))


def _set(name: str, expected: frozenset[Element] | None, actual: frozenset[Element] | None) -> Iterator[str]:
    if expected == actual:
        return
    if actual is None:
        yield f"set {name}: missing"
    elif expected is None:
        yield f"set {name}: unexpected, {len(actual)} elements"
    else:
        if absent := expected - actual:
            yield f"set {name}: {len(absent)} missing: {_some(absent)}"
        if extra := actual - expected:
            yield f"set {name}: {len(extra)} unexpected: {_some(extra)}"


def _some(elements: Iterable[Element]) -> str:
    ordered = sorted(
        elements, key=lambda one: (one[0].version, int(one[0].network_address), one[0].prefixlen, *one[1:])
    )
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(f"{element.network} {element.proto}/{element.port}" for element in ordered[:SHOWN]) + more
