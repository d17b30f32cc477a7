"""Runs: PID 1, once; everybody else reads what it hands down. Environment and initd.toml → `Settings`. Stdlib only.

The environment wins over the file. All problems are reported at once, and what is unknown is a problem too: a
mistyped variable must not quietly leave a default in force.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from initd.errors import ConfigError
from initd.files import MissingFileError, read_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

SETTINGS_VARIABLE = "INITD_SETTINGS"
DEFAULT_FILE = Path("/workspace/.aidevcontainer/initd.toml")
FILE_LIMIT = 64 * 1024

CAPABILITIES = ("conntrack", "dns", "ipv4", "ipv6", "nflog", "owner", "reject", "sets", "source", "timeouts")
"""What `require` may name: what a backend's probe finds (`initd.kernel.base.Probe`); `dns` is a guarded resolv.conf."""

READ_FROM = "INITD_SETTINGS_FROM"
"""The file that the settings were, or would have been, read from: the warden says so when a session can write it."""

PROTOCOL = frozenset(
    {"INITD_ENDED", "INITD_FDS", "INITD_GENERATION", "INITD_INIT", "INITD_PARENT_FD", "INITD_KEEPER_FD", READ_FROM}
)
"""What our own processes tell each other (docs/architecture.md); not settings."""

MAX_ID = 2**32 - 2
"""Largest UID and GID: 2**32-1 is "no change" to setresuid(2)."""


class Settings(NamedTuple):
    """Everything but the policy. Times are seconds, paths absolute, identities numbers other than 0."""

    policy: Path
    run_dir: Path
    state_dir: Path
    workspace: Path
    claude_uid: int
    claude_gid: int
    warden_user: str
    backend: str
    verify: str
    dns_floor: float
    dns_grace: float
    resolve_timeout: float
    stop_grace: float
    log_format: str
    log_level: str
    metrics_file: str
    require: str
    mode: str

    def environ(self) -> dict[str, str]:
        """These settings as variables, complete: `load` makes the same of them without looking at any file."""
        values = {FIELDS[name].variable: _text(value) for name, value in self._asdict().items()}
        return {**values, SETTINGS_VARIABLE: ""}


class Field(NamedTuple):
    """One setting: its variable, how a raw value becomes one of its kind (or ValueError), and its default."""

    variable: str
    parse: Callable[[Any], Any]
    default: Any


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(f"{value!r:.60} is not an absolute path")
    return Path(value)


def _path_or_nothing(value: Any) -> str:
    return "" if value == "" else str(_path(value))


def _identity(value: Any) -> int | str:
    """A UID or GID; `auto` stays a word until the workspace is known."""
    if value == "auto":
        return "auto"
    number = _integer(value)
    if number is None or number < 0:
        raise ValueError(f"{value!r:.60} is neither a number nor 'auto'")
    if number == 0:
        raise ValueError("0 is root, and sessions must not be root")
    if number > MAX_ID:
        raise ValueError(f"{number} is above {MAX_ID}, the largest that the kernel has")
    return number


def _integer(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 20:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _user(value: Any) -> str:
    """A user's name or UID, not root's: rules recognise the warden by its UID."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text or len(text) > 256 or any(one in text for one in ":/\0\n"):
        raise ValueError(f"{value!r:.60} is neither a user's name nor a UID")
    if text == "root" or (text.isdecimal() and int(text) == 0):
        raise ValueError("the warden must not be root: whatever it may reach, every process with its UID may")
    if text.isdecimal() and int(text) > MAX_ID:
        raise ValueError(f"{text} is above {MAX_ID}, the largest that the kernel has")
    return text


def _capabilities(value: Any) -> str:
    """Names of `CAPABILITIES` as a list, or as text with commas; kept as sorted text."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{value!r:.60} is not a list of names")
    for word in words:
        if word not in CAPABILITIES:
            raise _ClosestError(f"{word!r:.60} is not one of {', '.join(CAPABILITIES)}", word, CAPABILITIES)
    return ",".join(sorted(set(words)))


def _choice(*words: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if isinstance(value, str) and value.lower() in words:
            return value.lower()
        raise _ClosestError(f"{value!r:.60} is not one of {', '.join(words)}", str(value).lower(), words)

    return parse


def _seconds(least: float, most: float) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        try:
            number = float("nothing" if isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{value!r:.60} is not a number of seconds (no unit, as in 60 or 0.5)") from None
        if not least <= number <= most:  # not a number fails both
            raise ValueError(f"{value!s:.60} is not between {_text(least)} and {_text(most)} seconds")
        return number

    return parse


class _ClosestError(ValueError):
    """A word that is not one of a few."""

    def __init__(self, reason: str, word: str, words: Iterable[str]) -> None:
        super().__init__(reason)
        self.hint = _closest(word, words)


FIELDS: dict[str, Field] = {
    "policy": Field("INITD_POLICY", _path, "/workspace/.aidevcontainer/allowed-domains.txt"),
    "run_dir": Field("INITD_RUN_DIR", _path, "/run/initd"),
    "state_dir": Field("INITD_STATE_DIR", _path, "/var/lib/initd"),
    "workspace": Field("INITD_WORKSPACE", _path, "/workspace"),
    "claude_uid": Field("CLAUDE_UID", _identity, 501),
    "claude_gid": Field("CLAUDE_GID", _identity, 501),
    "warden_user": Field("INITD_WARDEN_USER", _user, "_initd"),
    "backend": Field("INITD_BACKEND", _choice("auto", "xtables", "nftables"), "auto"),
    "verify": Field("INITD_VERIFY", _choice("strict", "warn", "off"), "strict"),
    # A set's time-out of 0 means for ever (ipset(8)), so a lease of 0 seconds must not be possible.
    "dns_floor": Field("INITD_DNS_FLOOR", _seconds(1, 86_400), 60),
    "dns_grace": Field("INITD_DNS_GRACE", _seconds(0, 86_400), 30),
    "resolve_timeout": Field("INITD_RESOLVE_TIMEOUT", _seconds(0.1, 600), 10),
    "stop_grace": Field("INITD_STOP_GRACE", _seconds(0, 3_600), 8),
    "log_format": Field("INITD_LOG_FORMAT", _choice("auto", "console", "json"), "auto"),
    "log_level": Field("INITD_LOG_LEVEL", _choice("debug", "info", "warning", "error"), "info"),
    "mode": Field("INITD_MODE", _choice("enforce", "audit"), "enforce"),
    "metrics_file": Field("INITD_METRICS_FILE", _path_or_nothing, ""),
    "require": Field("INITD_REQUIRE", _capabilities, ""),
}


class _Problems:
    """Collects what is wrong, each with the place where it was written."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, where: str, reason: str, hint: str | None = None) -> None:
        self.lines.append(f"{where}: {reason}" + (f"\nhint: {hint}" if hint else ""))


def load(environ: Mapping[str, str]) -> Settings:
    """The settings that `environ` and the file it names describe. Raises ConfigError with every problem in it."""
    problems = _Problems()
    written = _from_file(environ, problems)
    _refuse_unknown(environ, problems)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name, field in FIELDS.items():
        # An empty variable is an unset one: compose files pass `${VARIABLE:-}` on.
        raw, place = environ.get(field.variable) or None, field.variable
        if raw is None and name in written:
            raw, place = written[name]
        try:
            values[name] = field.parse(field.default if raw is None else raw)
        except ValueError as error:
            problems.add(place, str(error), getattr(error, "hint", None))
        else:
            if raw is not None:
                places[name] = place
    _settle_identity(values, places, problems)
    if problems.lines:
        raise ConfigError("\n".join(problems.lines))
    return Settings(**values)


def _refuse_unknown(environ: Mapping[str, str], problems: _Problems) -> None:
    known = {SETTINGS_VARIABLE, *(field.variable for field in FIELDS.values())}
    for variable in sorted(set(environ) - known - PROTOCOL):
        if variable.startswith("INITD_"):
            problems.add(variable, "unknown variable", _closest(variable, known) or "docs/policy.md lists the settings")


def settings_file(environ: Mapping[str, str]) -> Path | None:
    """The file that `environ` names: the usual one when it names none, None when it says there is none."""
    named = environ.get(SETTINGS_VARIABLE)
    return DEFAULT_FILE if named is None else Path(named) if named else None


def _from_file(environ: Mapping[str, str], problems: _Problems) -> dict[str, tuple[Any, str]]:
    """Setting → (raw value, where it was written), for the keys of the file that are known."""
    path = settings_file(environ)
    if path is None:
        return {}
    try:
        document = _document(path)
    except MissingFileError as error:
        if SETTINGS_VARIABLE in environ:
            problems.add(SETTINGS_VARIABLE, error.message, error.hint)
        return {}
    except ConfigError as error:
        problems.lines.append(str(error))
        return {}
    for key in sorted(set(document) - set(FIELDS)):
        problems.add(str(path), f"unknown key {key!r}", _closest(key, FIELDS) or "docs/policy.md lists the settings")
    return {name: (document[name], f"{path}: {name}") for name in FIELDS if name in document}


def _document(path: Path) -> dict[str, Any]:
    raw = read_regular(path, FILE_LIMIT)
    import tomllib  # noqa: PLC0415 - 10 ms that a box without the file need not pay

    try:
        return tomllib.loads(raw.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8", hint="save the file as plain UTF-8 text") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise ConfigError(f"{path}: not TOML: {reason}", hint='write key = "value", strings in quotes') from error


def _settle_identity(values: dict[str, Any], places: Mapping[str, str], problems: _Problems) -> None:
    """`auto` becomes the workspace's owner, and neither the session's user nor its group may be the warden's."""
    if values.get("claude_uid") == "auto" and "claude_gid" not in places:
        values["claude_gid"] = "auto"
    for name, attribute in (("claude_uid", "st_uid"), ("claude_gid", "st_gid")):
        if values.get(name) == "auto" and "workspace" in values:
            where = places.get(name, places.get("claude_uid", ""))
            values[name] = _owner(values["workspace"], attribute, where, problems)
    user = values.get("warden_user")
    warden = _account_of(user) if isinstance(user, str) else (None, None)
    if values.get("claude_uid") == warden[0] is not None:
        where = places.get("claude_uid", "CLAUDE_UID")
        problems.add(where, f"{warden[0]} is the warden's own user ({user})", "sessions need another one")
    if values.get("claude_gid") == warden[1] is not None:  # it may write in the run directory
        where = places.get("claude_gid", places.get("claude_uid", "CLAUDE_GID"))
        problems.add(where, f"{warden[1]} is the group of the warden's user ({user})", "sessions need another one")


def _owner(workspace: Path, attribute: str, where: str, problems: _Problems) -> int:
    try:
        owner = int(getattr(workspace.stat(), attribute))
    except OSError as error:
        problems.add(where, f"'auto' needs {workspace}: {error.strerror}", "mount the workspace, or set a number")
        return MAX_ID
    if owner == 0:
        who = "root" if attribute == "st_uid" else "root's group"
        problems.add(where, f"'auto', but {workspace} belongs to {who}", "set the number that your files belong to")
    return owner


def _account_of(user: str) -> tuple[int, int] | tuple[None, None]:
    """UID and GID of a user, as `initd.prepare` has them; None without one (who starts the warden will say so)."""
    import pwd  # noqa: PLC0415 - whoever was handed settings down has no need for it

    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        return (int(user), int(user)) if user.isdecimal() else (None, None)
    return entry.pw_uid, entry.pw_gid


def _closest(word: str, words: Iterable[str]) -> str | None:
    from difflib import get_close_matches  # noqa: PLC0415 - only on the way to an error

    bare = {one.removeprefix("INITD_").lower(): one for one in words}  # what all begin with makes none alike
    close = get_close_matches(word.removeprefix("INITD_").lower(), sorted(bare), n=1, cutoff=0.7)
    return f"did you mean {bare[close[0]]}?" if close else None


def _text(value: object) -> str:
    """A value as a variable holds it; repr of a float is the shortest text that reads back the same."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
