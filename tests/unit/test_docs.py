"""Documents are checked: what is generated is compared, what is named exists, what is quoted is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from initd.settings import FIELDS
from tests.support import fwctl_docs

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse words its help differently from 3.13 on")
def test_the_command_reference_is_the_parsers_own() -> None:
    assert (ROOT / "docs/fwctl.md").read_text() == fwctl_docs.document(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def guarantees() -> list[list[str]]:
    """The cells of docs/security.md, "What is guaranteed": what, its tests, their controls."""
    text = (ROOT / "docs/security.md").read_text()
    section = text[text.index("## What is guaranteed") : text.index("## What is not guaranteed")]
    _head, _rule, *rows = (line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|"))
    return rows


def source_of(test: str) -> str:
    """The text of `FILE::FUNCTION`; AssertionError when there is no such test."""
    file, _, function = test.partition("::")
    assert (ROOT / file).is_file(), test
    found = re.search(
        rf"^( *)(?:async )?def {function}\(.*?(?=^\1\S|\Z)", (ROOT / file).read_text(), re.MULTILINE | re.DOTALL
    )
    assert found, test
    return found[0]


def test_every_row_has_three_cells() -> None:
    assert len(guarantees()) >= 20
    assert [row for row in guarantees() if len(row) != 3] == []


@pytest.mark.parametrize("row", guarantees(), ids=lambda row: row[0][:60])
def test_every_guarantee_names_its_tests_and_their_controls(row: list[str]) -> None:
    tests, controls = (cell.split("<br>") for cell in row[1:])
    assert len(tests) == len(controls), "a control beside each test"
    for test, control in zip(tests, controls, strict=True):
        source = source_of(named(test))
        if control == "in it":
            assert re.search("(negative|the) control(?! socket)", source), f"{test}: where is it?"
        elif not control.startswith("none: "):
            assert named(control) != named(test)
            source_of(named(control))


def named(cell: str) -> str:
    found = re.fullmatch(r"`(tests/[\w/]+\.py::test_\w+)`", cell)
    assert found, f"{cell} is no test"
    return found[1]


def test_a_test_that_does_not_exist_is_noticed() -> None:
    for missing in ("tests/unit/test_nothing.py::test_x", "tests/unit/test_docs.py::test_nothing_of_the_kind"):
        with pytest.raises(AssertionError, match=missing):
            source_of(missing)


def test_the_settings_table_is_complete() -> None:
    text = (ROOT / "README.md").read_text()
    known = {field.variable for field in FIELDS.values()}
    table = text[text.index("| setting |") : text.index("## Without Docker")]
    mentioned = set(re.findall(r"`((?:INITD|CLAUDE)_[A-Z_]+)`", table))
    paths = {"INITD_RUN_DIR", "INITD_STATE_DIR", "INITD_WORKSPACE", "INITD_WARDEN_USER"}
    assert mentioned | paths == known
    assert mentioned <= known
    assert all(one in text for one in paths)
