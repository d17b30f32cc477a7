"""Few errors, classed by who must act; each carries its exit code and a hint.

Exit codes follow sysexits.h so that `docker compose` shows something a person can look up.
"""

from __future__ import annotations

import os


class InitdError(Exception):
    """Anything that stops us. `code` is the process exit code, `hint` the next thing to try."""

    code = 70

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def tell(self) -> None:
        """Write it to stderr; where nobody reads that, the exit code has to do."""
        try:
            os.write(2, f"initd: {self}\n".encode(errors="replace"))
        except OSError:
            return


class UsageError(InitdError):
    """Whoever typed the command types another one (EX_USAGE)."""

    code = 64


class ConfigError(InitdError):
    """The operator edits a file or a variable (EX_CONFIG)."""

    code = 78


class PrivilegeError(InitdError):
    """Whoever starts the container grants something (EX_NOPERM)."""

    code = 77


class KernelError(InitdError):
    """The host's kernel lacks or refuses something (EX_OSERR)."""

    code = 71


class EnforcementError(InitdError):
    """The kernel does not hold what was asked of it, or behaviour says so (EX_SOFTWARE)."""

    code = 70
