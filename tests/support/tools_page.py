"""What tools say when they are refused, in docs/troubleshooting.md: `make docs` writes it, a test compares it."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

from tests.support import tools
from tests.support.lab import ROOT, Lab

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.support.tools import Told, Tool

PAGE = ROOT / "docs/troubleshooting.md"
HEAD = """\
| tool | the name is not listed | the address or port is not listed | exit code | gives up after |
|---|---|---|---|---|
"""
_BLOCK = re.compile(r"(<!-- refusals:[^\n]*-->\n).*?(<!-- /refusals -->)", re.DOTALL)
# Stack frames, and what npm says of its own log file.
_NOISE = re.compile(r"^\s*$|^(npm error)?\s+at |^\s+\.\.\. \d+ more$|complete log of this run")
_VARYING = (("after \\d+ ms", "after … ms"), ("0x[0-9a-f]+", "0x…"))


def quote(text: str, words: str) -> str:
    """The first and the last line, and those with the words to know it by; `…` stands for others."""
    for pattern, instead in _VARYING:
        text = re.sub(pattern, instead, text)
    lines = [line.rstrip() for line in text.splitlines() if not _NOISE.search(line)]
    ends = {0, len(lines) - 1}
    kept = [line if number in ends or words in line else "…" for number, line in enumerate(lines)]
    return "\n".join(line for number, line in enumerate(kept) if line != "…" or kept[number - 1] != "…")


def quotes(tool: Tool, told: Mapping[tuple[str, str], Told]) -> dict[str, str]:
    """What a tool printed, shortened, by the command line that was typed."""
    both = {case: told[tool.name, case] for case in tools.URLS}
    return {one.line: quote(one.text, tool.words(case)) for case, one in both.items()}


def row(tool: Tool, number: str, told: Mapping[tuple[str, str], Told], waits: float | None) -> str:
    """A tool's row of the table; `waits` are the seconds that it takes without its setting."""
    both = [told[tool.name, case] for case in tools.URLS]
    codes = ", ".join(dict.fromkeys(str(one.code) for one in both))
    took = f"{max(one.seconds for one in both):.1g} s"
    if waits is not None:
        took += f"; {waits:.0f} s without `{tool.hasty}`"
    return f"| {tool.name} {number} | `{tool.unknown}` | `{tool.refused}` | {codes} | {took} |"


def written() -> tuple[dict[str, str], dict[str, str]]:
    """The page's rows by tool with its version, and its quotes by command line."""
    found = _BLOCK.search(PAGE.read_text())
    assert found is not None, f"{PAGE.name} has no block for refusals"
    table, _, fenced = found[0].partition("\n```\n")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}
    blocks = fenced.partition("\n```\n")[0].split("\n\n")
    return rows, {head.removeprefix("$ "): rest for head, _, rest in (block.partition("\n") for block in blocks)}


def unsaid(tool: Tool, number: str, told: Mapping[tuple[str, str], Told], waits: float | None) -> list[str]:
    """What was seen of a tool and is not on the page; nothing, with a warning, if the page knows another version."""
    rows, blocks = written()
    known = [name for name in rows if name.startswith(f"{tool.name} ")]
    assert len(known) == 1, f"{PAGE.name} has no row for {tool.name}"
    if known != [f"{tool.name} {number}"]:
        warnings.warn(
            f"{PAGE.name} quotes {known[0]}; here is {number}, of which only the words are checked", stacklevel=2
        )
        return []
    seen = (
        [row(tool, number, told, waits)] if timeless(row(tool, number, told, waits)) != timeless(rows[known[0]]) else []
    )
    return seen + [f"$ {line}\n{text}" for line, text in quotes(tool, told).items() if blocks.get(line) != text]


def timeless(line: str) -> str:
    """A row without its seconds."""
    return re.sub(r"[\d.e+-]+ s\b", "N s", line)


def claimed(tool: Tool) -> float:
    """Seconds that a tool takes without its setting, as the page has it."""
    (line,) = (line for name, line in written()[0].items() if name.startswith(f"{tool.name} "))
    found = re.search(r"; (\d+) s without", line)
    assert found is not None, line
    return float(found[1])


def document() -> Iterator[str]:
    """The generated part, measured now, one tool after the other."""
    with Lab() as lab:
        box = tools.start(lab)
        told = tools.run_all(box, workers=1)
        yield HEAD
        for tool in tools.TOOLS:
            waits = tools.patience(box, tool) if tool.hasty else None
            yield row(tool, tools.version(box, tool), told, waits) + "\n"
        yield "\n```\n"
        yield "\n\n".join(f"$ {line}\n{text}" for tool in tools.TOOLS for line, text in quotes(tool, told).items())
        yield "\n```\n"


def write() -> None:
    text = "".join(document())
    PAGE.write_text(_BLOCK.sub(lambda found: found[1] + text + found[2], PAGE.read_text()))


if __name__ == "__main__":
    write()
