"""The host's side of client.py: try connections as somebody in a box and get the outcome as a value."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.support import product
from tests.support.box import CLIENT
from tests.support.namespaces import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.box import Box

Target = tuple[str, str, int]  # tcp, udp or icmp (port 0), name or address, port


@dataclass(frozen=True, slots=True)
class Attempt:
    """`error` is an errno or EAI name, None when somebody answered; `ms` as measured in the box, name included."""

    error: str | None
    address: str | None
    ms: float


def client(*arguments: str) -> list[str]:
    """The command line of client.py as it is in every box."""
    return [str(product.PYTHON), "-I", CLIENT, *arguments]


def attempt_all(box: Box, targets: Sequence[Target], *, user: str | tuple[int, int] = "session") -> list[Attempt]:
    """Try targets one after the other, all from one process."""
    done = box.exec(client("attempts", json.dumps(targets)), user=user, timeout=60)
    if done.returncode:
        raise LabError(f"client.py: {done.returncode}: {done.stderr}")
    return [Attempt(**outcome) for outcome in json.loads(done.stdout)]


def attempt(box: Box, target: Target, *, user: str | tuple[int, int] = "session") -> Attempt:
    """Try one target."""
    return attempt_all(box, [target], user=user)[0]
