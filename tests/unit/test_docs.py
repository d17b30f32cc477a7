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


def test_every_guarantee_names_a_test_that_exists() -> None:
    text = (ROOT / "docs/security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) >= 20
    for file, function in named:
        assert (ROOT / file).is_file(), file
        if function:
            assert re.search(rf"^ *(async )?def {function}\(", (ROOT / file).read_text(), re.MULTILINE), (
                f"{file}::{function}"
            )


def test_every_row_of_the_guarantees_names_its_test() -> None:
    text = (ROOT / "docs/security.md").read_text()
    section = text[text.index("## What is guaranteed") : text.index("## What is not guaranteed")]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| guarantee")]
    assert len(rows) >= 12
    assert [row for row in rows if "`tests/" not in row] == []


def test_the_settings_table_is_complete() -> None:
    text = (ROOT / "README.md").read_text()
    known = {field.variable for field in FIELDS.values()}
    table = text[text.index("| setting |") : text.index("## Without Docker")]
    mentioned = set(re.findall(r"`((?:INITD|CLAUDE)_[A-Z_]+)`", table))
    paths = {"INITD_RUN_DIR", "INITD_STATE_DIR", "INITD_WORKSPACE", "INITD_WARDEN_USER"}
    assert mentioned | paths == known
    assert mentioned <= known
    assert all(one in text for one in paths)
