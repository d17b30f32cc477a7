"""Runs: warden, once. Which backend works here is found out by trying, not by version; none means: refuse to start."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from initd.errors import ConfigError, InitdError, KernelError, PrivilegeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from initd.kernel.base import Backend, Probe

BACKENDS = {"xtables": "Xtables", "nftables": "Nftables"}
"""Module → class, in the order in which `auto` tries them."""


def _make(name: str) -> Backend:
    """The backend of that name; imported only now, because python-iptables takes 185 ms."""
    backend: Backend = getattr(importlib.import_module(f"initd.kernel.{name}"), BACKENDS[name])()
    return backend


def demand(required: str, found: Mapping[str, bool]) -> None:
    """KernelError when this namespace lacks one of `required` (names with commas between them)."""
    missing = [name for name in required.split(",") if name and not found.get(name, False)]
    if missing:
        raise KernelError(
            f"required, but cannot be had here: {', '.join(missing)}",
            hint="see docs/portability.md for what the host has to offer, or take it out of `require`",
        )


def pick(choice: str) -> tuple[Backend, Probe]:
    """The first usable backend of `choice` ("auto", "xtables", "nftables"), and what its probe found here.

    KernelError says what each one lacks, PrivilegeError that none could even be tried, ConfigError that there is no
    such backend.
    """
    if choice != "auto" and choice not in BACKENDS:
        raise ConfigError(f"unknown backend {choice!r}", hint=f"one of: auto, {', '.join(BACKENDS)}")
    lacking: list[str] = []
    denied: PrivilegeError | None = None
    for name in BACKENDS if choice == "auto" else (choice,):
        try:
            backend = _make(name)
            probe = backend.probe()
        except InitdError as error:
            denied = error if isinstance(error, PrivilegeError) else denied
            lacking.append(f"{name}: {error.message}")
        except ImportError as error:
            lacking.append(f"{name}: {error}")
        else:
            if probe.usable:
                return backend, probe
            lacking.append(f"{name}: {', '.join(probe.missing)}")
    message = f"no usable firewall backend: {'; '.join(lacking)}"
    if denied is not None:
        raise PrivilegeError(message, hint=denied.hint)
    raise KernelError(
        message,
        hint="load nf_tables, or ip_tables, ip6_tables and ip_set, on the host; see docs/portability.md",
    )
