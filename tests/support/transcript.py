"""The demo in the README: `make docs` writes it, a test compares it. What differs from run to run is left out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
_BLOCK = re.compile(r"(<!-- demo:[^\n]*-->\n```\n)(.*?)(```\n<!-- /demo -->)", re.DOTALL)


def quoted() -> str:
    """The transcript as the README has it."""
    found = _BLOCK.search(README.read_text())
    assert found is not None, "README.md has no demo block"
    return found[2]


def essence(text: str) -> str:
    """`text` without numbers and line breaks."""
    return re.sub(r"\d+(\.\d+)*", "N", " ".join(text.split()))


def write() -> None:
    """Run the demo and quote it; CalledProcessError when it fails."""
    told = subprocess.run([sys.executable, "-m", "tests.support.demo"], check=True, stdout=subprocess.PIPE, text=True)
    text = _BLOCK.sub(lambda found: found[1] + told.stdout.strip() + "\n" + found[3], README.read_text())
    README.write_text(text)


if __name__ == "__main__":
    write()
