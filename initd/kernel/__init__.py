"""The only code that touches netfilter."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from initd.errors import KernelError

if TYPE_CHECKING:
    from initd.kernel.base import Backend, Probe

BACKENDS = {"xtables": "Xtables", "nftables": "Nftables"}
"""Module below `initd.kernel` → its class, in the order in which `auto` tries them."""


def open_backend(name: str) -> tuple[Backend, Probe]:
    """The backend `name` ("xtables", "nftables" or "auto": the first one that works here), and what it found.

    Raises KernelError saying what each lacks, PrivilegeError when it is us who may not.
    """
    complaints: list[str] = []
    for candidate in BACKENDS if name == "auto" else (name,):
        try:
            backend: Backend = getattr(import_module(f"initd.kernel.{candidate}"), BACKENDS[candidate])()
            probe = backend.probe()
        except (KernelError, ImportError) as error:
            complaints.append(f"{candidate}: {error.message if isinstance(error, KernelError) else error}")
            continue
        if probe.usable:
            return backend, probe
        complaints += [f"{candidate}: {part}" for part in probe.missing]
    raise KernelError(
        f"no usable packet filter: {'; '.join(complaints)}",
        hint="the host's kernel must offer nf_tables, or ip_tables, ip6_tables and ip_set",
    )
