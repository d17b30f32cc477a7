"""Runs: warden. One call into libnftables: text in, one transaction, text out; every failure is an `InitdError`.

The C library comes through ctypes (libnftables(3)), so nothing has to be compiled. Each call makes and frees its own
context: no state is shared between threads, and what a large ruleset took is given back. ctypes releases the
interpreter lock meanwhile, so that the event loop goes on.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import re
import socket
from typing import Any

from initd.errors import KernelError, PrivilegeError

NETLINK_NETFILTER = 12
_FLAGS = 16 | 128 | 256  # NFT_CTX_OUTPUT_JSON | _NUMERIC_PROTO | _NUMERIC_PRIO: slim images have no /etc/protocols
_TERSE = 2048  # NFT_CTX_OUTPUT_TERSE: sets without their elements
_RETRIES = 20
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "nft_ctx_new": (ctypes.c_void_p, (ctypes.c_uint32,)),
    "nft_ctx_free": (None, (ctypes.c_void_p,)),
    "nft_ctx_output_set_flags": (None, (ctypes.c_void_p, ctypes.c_uint)),
    "nft_ctx_set_dry_run": (None, (ctypes.c_void_p, ctypes.c_bool)),
    "nft_ctx_buffer_output": (ctypes.c_int, (ctypes.c_void_p,)),
    "nft_ctx_buffer_error": (ctypes.c_int, (ctypes.c_void_p,)),
    "nft_ctx_get_output_buffer": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "nft_ctx_get_error_buffer": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "nft_run_cmd_from_buffer": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_char_p)),
}


@functools.cache
def _library() -> ctypes.CDLL:
    """The loaded library. KernelError when it is not installed; a failure is not cached."""
    try:
        library = ctypes.CDLL("libnftables.so.1")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise KernelError(
            f"libnftables.so.1 cannot be loaded: {error}", hint="install libnftables1 (Debian) or nftables (Alpine)"
        ) from error
    return library


def error_of(number: int, what: str) -> KernelError | PrivilegeError:
    """An errno from netfilter as the error of whoever must act: EPERM is the starter's, the rest the kernel's."""
    if number in {errno.EPERM, errno.EACCES}:
        return PrivilegeError(
            f"{what}: {os.strerror(number)}", hint="give the container the capability NET_ADMIN (cap_add: [NET_ADMIN])"
        )
    return KernelError(f"{what}: {os.strerror(number)}")


def _explain(text: str) -> KernelError | PrivilegeError:
    """The library's first complaint, with the command that it is about; its position markers are noise."""
    lines = [line for line in text.splitlines() if line.strip(" ^~\t")]
    first = next((number for number, line in enumerate(lines) if "rror:" in line), 0)
    message = re.sub(r"^.*?[Ee]rror: ", "", lines[first]) if lines else "no reason given"
    command = lines[first + 1].strip()[:160] if first + 1 < len(lines) else ""
    full = f"nftables: {message}" + (f" ({command})" if command else "")
    if os.strerror(errno.EPERM) in text:
        return error_of(errno.EPERM, full.removesuffix(f": {os.strerror(errno.EPERM)}"))
    return KernelError(full)


def _check_netlink() -> None:
    """Fail as an error where libnftables would end the whole process: when there is no netlink socket to be had."""
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER).close()
    except OSError as error:
        raise error_of(error.errno or errno.EIO, "no netlink socket for netfilter") from error


def run(commands: str, *, dry: bool = False, terse: bool = False) -> str:
    """Carry out `commands` (nft(8) syntax) as one transaction and return the library's JSON output.

    `dry` lets the kernel judge the transaction and then abort it. Somebody else's transaction between the library's
    look at the ruleset and its own commit is not an error (EINTR, ERESTART, nf_tables_valid_genid()): tried again.
    """
    library = _library()
    _check_netlink()
    for attempt in range(_RETRIES):
        context = library.nft_ctx_new(0)
        try:
            library.nft_ctx_output_set_flags(context, _FLAGS | (_TERSE if terse else 0))
            library.nft_ctx_set_dry_run(context, dry)
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            if library.nft_run_cmd_from_buffer(context, commands.encode()) == 0:
                return str(library.nft_ctx_get_output_buffer(context).decode())
            text = library.nft_ctx_get_error_buffer(context).decode(errors="replace")
        finally:
            library.nft_ctx_free(context)
        if "Interrupted system call" not in text or attempt == _RETRIES - 1:
            break
    raise _explain(text)


def listing(command: str) -> list[dict[str, Any]]:
    """What a `list` command finds, without the elements of sets; the objects of libnftables-json(5)."""
    text = run(command, terse=True)
    try:
        found: list[dict[str, Any]] = json.loads(text)["nftables"]
    except (ValueError, LookupError) as error:
        raise KernelError(f"nftables: unreadable listing ({text[-80:]!r})") from error
    return found
