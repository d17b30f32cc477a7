"""All tests in two halves at once: `python -m tests.support.halves [PYTEST OPTIONS]`.

What needs an engine or a lab mostly waits, and so do the soak and PID 1's tests. The rest's output comes when both are
over. Exit code: 0 when both are well, otherwise that of one that is not.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

FIRST = ("tests/e2e", "tests/kernel")
REST = tuple(f"--ignore={folder}" for folder in FIRST)


def main() -> int:
    """Run both, the first in view."""
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    with tempfile.TemporaryFile("w+") as kept:
        second = subprocess.Popen([*pytest, *REST], stdin=subprocess.DEVNULL, stdout=kept, stderr=subprocess.STDOUT)
        try:
            code = subprocess.run([*pytest, *FIRST], check=False).returncode
        except KeyboardInterrupt:  # a terminal's, which the second half has had as well
            code = 130
        code = second.wait() or code
        kept.seek(0)
        sys.stdout.write(kept.read())
    return code


if __name__ == "__main__":
    sys.exit(main())
