"""`make soak HOURS=24`, `make soak MINUTES=30 SEED=7`: docs/soak.md says what it does and how it judges.

Exit codes: 0 nothing went wrong, 1 something did, 77 it cannot run here, 130 interrupted (and nothing went wrong).
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tests.soak.report import table
from tests.soak.run import Plan, Soak
from tests.support import lab as labs
from tests.support.lab import Lab

EVERY = 30.0  # seconds between two lines of a long run
LONG = 600.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", choices=["auto", "xtables", "nftables"], default="auto")
    parser.add_argument("--report", type=Path, help="write the table here, too")
    return parser.parse_args()


def main() -> int:
    """One soak, its table on standard output."""
    # A terminal sends Ctrl-C to everybody; blocked, it is inherited as such, and only the run itself asks for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    given = arguments()
    seconds = given.hours * 3600 + given.minutes * 60 + given.seconds or 120.0
    if (reason := labs.can_run()) is not None:
        print(f"soak: {reason}\nhint: sudo make soak, on a Linux machine or VM", file=sys.stderr)
        return 77
    plan = Plan(seconds=seconds, seed=given.seed, backend=given.backend, every=EVERY if seconds > LONG else 10.0)
    print(f"soak: {seconds:.0f} s, seed {plan.seed}; Ctrl-C ends it early and judges what was run", flush=True)
    with Lab() as lab:
        soak = Soak(plan, lab, say=lambda line: print(line, flush=True))
        soak.run()
    text = table(soak)
    print(f"\n{text}", flush=True)
    if given.report:
        given.report.write_text(text)
    if soak.problems.total():
        return 1
    return 130 if soak.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
