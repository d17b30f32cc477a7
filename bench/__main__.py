"""One command, one page: run every bench and write docs/benchmarks.md. `python -m bench [NAME …]` runs some of them."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

BENCHES = ("boot", "script", "rules", "flows", "dns")
PAGE = Path("docs/benchmarks.md")

INTRO = """\
# Benchmarks

Written by `make bench`; nothing here is typed by hand. Each figure is a median of several runs, and each comparison was
made in one run on one machine. Machines differ and are shared: look at the ratios first. Half an hour under load,
with what it cost in memory, is in [soak.md](soak.md).

Measured {date} on Linux {kernel}, {machine}, Python {python}.
"""


def main() -> int:
    """Run what is asked for; the page is only written when all of them were run and succeeded."""
    wanted = sys.argv[1:] or list(BENCHES)
    parts = []
    for name in wanted:
        sys.stderr.write(f"bench: {name} …\n")
        done = subprocess.run([sys.executable, "-m", f"bench.{name}"], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.stderr.write(f"bench: {name} failed ({done.returncode})\n")
            return done.returncode
        sys.stdout.write(done.stdout + "\n")
        parts.append(done.stdout)
    if wanted == list(BENCHES):
        date = datetime.now(UTC).date().isoformat()
        intro = INTRO.format(
            date=date, kernel=platform.release(), machine=platform.machine(), python=platform.python_version()
        )
        PAGE.write_text("\n".join([intro, *parts]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
