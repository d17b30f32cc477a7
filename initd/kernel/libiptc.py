"""Runs: warden. Legacy tables through python-iptables, which is imported here, late, and nowhere else.

What it would do behind our back is kept from it: it spawns nothing (`_without_spawning`), commits only when told (its
autocommit swallows errors), never reads a rule back (that redirects fd 1) and never sees the nat, mangle or raw table.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from initd.errors import KernelError, PrivilegeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from initd.kernel.chains import Options, Rule

_LIBRARIES = ("usr/lib/*-linux-*", "lib/*-linux-*", "usr/lib", "lib", "usr/lib64", "usr/local/lib")
_ATTEMPTS = 50
"""Commits that somebody else's commit may spoil before we give up; each is rebuilt from what stands then."""

_SPOILT = (errno.EAGAIN, errno.EINVAL)
"""What the kernel answers when the table is no longer the one of the snapshot (xt_replace_table), and when it is no
longer the one that we have just put there and want the counters carried over to (do_add_counters)."""

_TABLES = {4: "ip_tables", 6: "ip6_tables"}
_PROTOCOL = {"ipv6-icmp": "icmpv6"}  # iptables' name → python-iptables' name


def edit_table(version: int, change: Callable[[Any, int], None]) -> None:
    """Run `change(table, version)` on a snapshot of filter and commit it; somebody else's commit in between: again.

    Raises KernelError or PrivilegeError, and then nothing was changed.
    """
    library = load()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            table = (library.Table if version == 4 else library.Table6)("filter", autocommit=False)
            table.refresh()
            try:
                change(table, version)
                table.commit()
            finally:
                table.close()
        except library.IPTCError as error:
            if attempt < _ATTEMPTS and any(os.strerror(code) in str(error) for code in _SPOILT):
                continue
            raise _trouble(version, error) from error
        except (library.XTablesError, ValueError, AttributeError, OSError) as error:
            raise _trouble(version, error) from error
        return


def compiled(version: int, rule: Rule) -> Any:
    """The rule as python-iptables holds it. `final_check` is left out: it redirects fd 1 and parses its own output."""
    library = load()
    made = library.Rule() if version == 4 else library.Rule6()
    header = made.get_ip()
    if rule.source is not None:
        made.src = str(rule.source)
    if rule.destination is not None:
        made.dst = str(rule.destination)
    # By hand: Rule6 masks names with 0x01 instead of 0xff, and "tun0" would match "-o lo".
    if rule.inside is not None:
        header.iniface, header.iniface_mask = rule.inside.encode(), b"\xff" * (len(rule.inside) + 1)
    if rule.outside is not None:
        header.outiface, header.outiface_mask = rule.outside.encode(), b"\xff" * (len(rule.outside) + 1)
    if rule.proto is not None:
        made.protocol = _PROTOCOL.get(rule.proto, rule.proto)
    for name, options in rule.matches:
        _set_options(made.create_match(name), options)
    _set_options(made.create_target(rule.target), rule.options)
    return made


def _set_options(part: Any, options: Options) -> None:
    # NFLOG parses into scratch memory (udata) that python-iptables has freed by then: a heap overrun. Ours stays alive.
    module = part._module  # noqa: SLF001
    scratch = (ctypes.c_ubyte * max(1, module.udata_size))()
    module.udata = ctypes.cast(scratch, ctypes.c_void_p)
    for parameter, value in options:
        part.set_parameter(parameter, list(value))
    module.udata = None


def _trouble(version: int, error: Exception) -> KernelError | PrivilegeError:
    text = str(error)
    if os.strerror(errno.EPERM) in text or "you must be root" in text.lower():
        return PrivilegeError(
            f"{_TABLES[version]}: not permitted to change rules",
            hint="grant the container NET_ADMIN and NET_RAW (cap_add)",
        )
    if os.strerror(errno.ENOPROTOOPT) in text or "does not exist" in text:
        return KernelError(
            f"{_TABLES[version]}: the kernel has no legacy filter table here",
            hint=f"load it on the host (modprobe {_TABLES[version]}) or use the nftables backend",
        )
    return KernelError(f"{_TABLES[version]}: {text}")


_library: ModuleType | None = None


def load() -> Any:
    """The `iptc` module. Raises KernelError when it or its libraries are not there."""
    global _library  # noqa: PLW0603 - an import happens once
    if _library is None:
        extensions = next((path for name in _LIBRARIES for path in Path("/").glob(f"{name}/xtables")), None)
        if extensions is None:
            raise KernelError("the iptables extensions (libxt_*.so) are not installed", hint="install iptables")
        os.environ.setdefault("XTABLES_LIBDIR", str(extensions))
        try:
            with _without_spawning():
                import iptc  # noqa: PLC0415
        except (ImportError, OSError, AttributeError) as error:
            raise KernelError(
                f"python-iptables cannot be used: {error}", hint="install iptables (libxtables)"
            ) from error
        _share_owner()
        _read_options_of_any_release()
        # Looking whether a target is a chain would open, and so create, every other table.
        for table in (iptc.Table, iptc.Table6):
            table.existing_table_names.update(dict.fromkeys(table.ALL, False) | {"filter": True})
        _library = iptc
    return _library


def _share_owner() -> None:
    """Let both families use one `owner`: looked up again for the second, libxtables warns of a revision 0 on stderr."""
    from iptc.xtables import NFPROTO_IPV4, NFPROTO_IPV6, xtables  # noqa: PLC0415

    if found := xtables(NFPROTO_IPV4).find_match("owner"):
        xtables(NFPROTO_IPV6)._loaded(b"owner", found)  # noqa: SLF001


def _read_options_of_any_release() -> None:
    """Let every option be found: iptables 1.8.11 made `struct xt_option_entry` (xtables.h) one field longer.

    With the length that python-iptables 1.2.0 knows, only the first option of an extension is seen. Nothing says
    which of the two is installed, but udp has several: where the second name would be, the longer struct has zeros.
    """
    from iptc.xtables import NFPROTO_IPV4, xt_option_entry, xtables  # noqa: PLC0415

    found = xtables(NFPROTO_IPV4).find_match("udp")
    if not found or not found[0].x6_options:
        return
    short = ctypes.sizeof(xt_option_entry)
    second = ctypes.c_void_p.from_address(ctypes.addressof(found[0].x6_options.contents) + short)
    length = short if second.value else short + 8  # an int, and padding

    def lookup(_self: Any, entries: Any, name: bytes) -> Any:
        address = ctypes.addressof(entries.contents)
        while (entry := xt_option_entry.from_address(address)).name not in (None, name):
            address += length
        return entry if entry.name else None

    xtables._option_lookup = lookup  # noqa: SLF001


@contextmanager
def _without_spawning() -> Iterator[None]:
    """Let `iptc` find a stand-in for its `iptc.util`, which runs modprobe, ldconfig, gcc and ld."""
    stand_in = ModuleType("iptc.util")
    stand_in.__dict__.update(
        find_library=_find_library,
        find_libc=lambda: ctypes.CDLL(None, mode=ctypes.RTLD_GLOBAL),
        load_kernel=lambda name, exc_if_failed=False: None,  # noqa: ARG005 - a container cannot load modules
    )
    sys.modules["iptc.util"] = stand_in
    try:
        yield
    except BaseException:
        del sys.modules["iptc.util"]
        raise


def _find_library(*names: str) -> tuple[ctypes.CDLL, int]:
    """(library, major version): in the usual directories, or for its C wrapper beside the package itself."""
    for name in names:
        for root, place in (*(("/", one) for one in _LIBRARIES), *((one, "") for one in sys.path if one)):
            for path in sorted(Path(root).glob(f"{place}/lib{name}.*so*".lstrip("/")), key=lambda path: len(path.name)):
                major = re.search(r"\.so\.(\d+)", path.name)
                return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL), int(major[1]) if major else 0
    raise OSError(f"no shared library lib{names[0]}")
