"""curl, git, npm, pip, cargo, go, Java: refused at once, in the words of docs/troubleshooting.md, then let through."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support import tools, tools_page
from tests.support.tools import TOOLS, Told, Tool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.support.box import Box
    from tests.support.lab import Lab

pytestmark = pytest.mark.kernel

LIMIT = 8.0  # seconds; a JVM on a busy machine needs 3, an unanswered question to a resolver costs 10
ADDRESSES = ("203.0.113.20", "2001:db8:2::20")  # of other.example
HASTY = [tool for tool in TOOLS if tool.hasty]
every_tool = pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
every_case = pytest.mark.parametrize("case", tools.URLS)


@dataclass(frozen=True)
class Scene:
    lab: Lab
    box: Box
    told: Mapping[tuple[str, str], Told]  # while nothing but site.example is listed


@pytest.fixture(scope="module")
def scene(module_lab: Lab) -> Iterator[Scene]:
    box = tools.start(module_lab)
    told = tools.run_all(box)
    for tool in TOOLS:
        for case in tools.URLS:
            # Once more and alone: what a busy machine made slow is faster then, what waits for an answer is not.
            if told[tool.name, case].seconds >= LIMIT:
                told[tool.name, case] = tools.run(box, tool, tool.line(case))
    yield Scene(module_lab, box, told)
    box.close()


@every_tool
@every_case
def test_it_is_refused_at_once_and_says_why(scene: Scene, tool: Tool, case: str) -> None:
    told = scene.told[tool.name, case]
    assert told.code != 0, told.text
    assert told.seconds < LIMIT, told
    assert tool.words(case) in told.text
    (other,) = tools.URLS.keys() - {case}
    assert tool.words(other) not in told.text, "the two cases can be told apart"
    assert "timed out" not in told.text.lower()


@every_tool
def test_an_unlisted_address_is_refused_in_the_words_of_an_unlisted_port(scene: Scene, tool: Tool) -> None:
    line = tool.line("unknown").replace(tools.URLS["unknown"], f"https://{ADDRESSES[0]}")
    told = tools.run(scene.box, tool, line)
    if told.seconds >= LIMIT:
        told = tools.run(scene.box, tool, line)
    assert told.code == scene.told[tool.name, "refused"].code
    assert told.seconds < LIMIT, told
    assert tool.refused in told.text


@every_tool
def test_the_page_says_what_it_prints(scene: Scene, tool: Tool) -> None:
    waits = tools_page.claimed(tool) if tool.hasty else None
    told = tools_page.unsaid(tool, tools.version(scene.box, tool), scene.told, waits)
    assert told == [], f"{tools_page.PAGE.name} does not say this; run `make docs`"


@pytest.mark.parametrize("tool", HASTY, ids=lambda tool: tool.name)
def test_the_page_says_how_long_it_tries_again(scene: Scene, tool: Tool) -> None:
    waits = tools.patience(scene.box, tool)
    assert waits > 5.0, "it tries again, unless told otherwise"
    assert waits / 2 < tools_page.claimed(tool) < waits * 2, waits


def test_pip_without_any_retry_does_not_say_why(scene: Scene) -> None:
    """Why the page advises one."""
    (pip,) = (tool for tool in TOOLS if tool.name == "pip")
    told = tools.run(scene.box, pip, pip.line("unknown").replace(pip.hasty, "PIP_RETRIES=0"))
    assert "No matching distribution found" in told.text
    assert pip.unknown not in told.text


def test_a_page_that_says_something_else_is_found_out(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the comparison: in the table and in the quotes."""
    curl = TOOLS[0]
    number, text = tools.version(scene.box, curl), tools_page.PAGE.read_text()
    monkeypatch.setattr(tools_page, "PAGE", tmp_path / "page.md")
    for old, new in (("| 6, 7 |", "| 7, 6 |"), ("curl: (6) Could", "curl: (6) Cannot")):
        assert old in text
        tools_page.PAGE.write_text(text.replace(old, new))
        assert len(tools_page.unsaid(curl, number, scene.told, None)) == 1


def test_nothing_of_it_left_the_box(scene: Scene) -> None:
    assert scene.lab.packets(to=ADDRESSES) == []
    assert scene.lab.packets(port=4443) == []
    assert scene.lab.dns.queries("other.example") == []


@pytest.fixture(scope="module")
def let_through(scene: Scene) -> Mapping[tuple[str, str], Told]:
    """The same commands, when the policy has the lines that `fwctl suggest` proposes."""
    until = time.monotonic() + 30.0
    while not {"other.example:443", "site.example:4443"} <= set(lines := suggested(scene.box)):
        assert time.monotonic() < until, lines
        time.sleep(0.1)
    scene.box.write_policy(tools.POLICY + "\n".join(lines) + "\n")
    reloaded = scene.box.fwctl("reload")
    assert reloaded.returncode == 0, reloaded.stderr
    return tools.run_all(scene.box)


def suggested(box: Box) -> list[str]:
    return [line.split()[0] for line in box.fwctl("suggest").stdout.splitlines() if line]


@every_tool
@every_case
def test_what_fwctl_suggests_lets_it_through(
    let_through: Mapping[tuple[str, str], Told], tool: Tool, case: str
) -> None:
    """Negative control of all above, so it comes last: the same command line, and only the policy differs."""
    told = let_through[tool.name, case]
    assert told.code == 0, told.text
    assert tool.done in told.text
