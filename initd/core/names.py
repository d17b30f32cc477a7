"""Host names as DNS has them: lower case A-labels without the trailing dot, or the reason why not.

Internationalized names go through the standard library's `idna` codec (IDNA 2003, RFC 3490). The four characters
that IDNA 2008 reads differently (RFC 5894 section 7.2) are refused: they would silently name another host.
"""

from __future__ import annotations

import re

MAX_NAME = 253
"""Characters of a name without the trailing dot: 255 octets on the wire (RFC 1035 section 2.3.4)."""

MAX_LABEL = 63

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DOTS = re.compile("[\u3002\uff0e\uff61]")  # RFC 3490 section 3.1: these are dots too
_DEVIATIONS = "\u00df\u03c2\u200c\u200d"


class NameFaultError(Exception):
    """Not a host name: `reason`, the `fragment` it is about, and perhaps a hint."""

    def __init__(self, reason: str, fragment: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fragment = fragment
        self.hint = hint


def to_ascii(text: str) -> str:
    """`text` as lower case A-labels without the trailing dot. Raises NameFaultError."""
    labels = _DOTS.sub(".", text).lower().removesuffix(".").split(".")
    name = ".".join(_label(label, text) for label in labels)
    if len(name) > MAX_NAME:
        raise NameFaultError(f"a name has at most {MAX_NAME} characters, this one has {len(name)}", text)
    if _NUMBER.fullmatch(last := name.rpartition(".")[2]):
        # The WHATWG URL standard ("ends in a number") and inet_aton(3) take such a name for an IPv4 address.
        raise NameFaultError(
            f"{text!r} is neither a name nor an address: a name does not end in a number",
            last if last in text else text,
            "write an IPv4 address as four numbers from 0 to 255, as in 192.0.2.1",
        )
    return name


def _label(label: str, text: str) -> str:
    if len(label) <= MAX_LABEL and _LABEL.fullmatch(label):
        return label
    if not label:
        raise NameFaultError(f"empty label in {text!r}", text, "write one dot between two labels")
    if not label.isascii():
        label = _encode(label, text)
    if len(label) > MAX_LABEL:
        raise NameFaultError(f"a label has at most {MAX_LABEL} characters, {label[:20]!r}… has {len(label)}", text)
    if label[0] == "-" or label[-1] == "-":
        raise NameFaultError(f"label {label!r} begins or ends with a hyphen", label if label in text else text)
    wrong = next((character for character in label if not _LABEL.fullmatch(character) and character != "-"), None)
    if wrong is not None:
        hint = "write it without quotes" if wrong in "\"'`" else None
        raise NameFaultError(f"{wrong!r} cannot be in a name", wrong if wrong in text else text, hint)
    return label


def _encode(label: str, text: str) -> str:
    deviation = next((character for character in label if character in _DEVIATIONS), None)
    if deviation is not None:
        hint = "write the name as its registrar shows it in ASCII, with xn--"
        raise NameFaultError(f"{deviation!r} means different hosts in IDNA 2003 and 2008", deviation, hint)
    try:
        return label.encode("idna").decode("ascii")
    except UnicodeError as error:
        long = "too long" in str(error)
        reason = f"a label has at most {MAX_LABEL} characters" if long else f"{label!r} cannot be written as IDNA"
        raise NameFaultError(reason, text) from error


def ancestors(name: str) -> list[str]:
    """Every proper parent, the nearest first and the root ("") last."""
    parts = name.split(".")
    return [".".join(parts[index:]) for index in range(1, len(parts) + 1)]
