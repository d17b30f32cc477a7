from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from initd.errors import ConfigError
from initd.settings import CAPABILITIES, FIELDS, FILE_LIMIT, MAX_ID, PROTOCOL, Settings, load, settings_file

NO_FILE = {"INITD_SETTINGS": ""}


def refused(environ) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(environ)
    assert caught.value.code == 78
    return str(caught.value).splitlines()


def with_file(tmp_path, text, **environ):
    path = tmp_path / "initd.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return {"INITD_SETTINGS": str(path), **environ}


# ---- defaults and sources


def test_defaults():
    assert load(NO_FILE) == Settings(
        policy=Path("/workspace/.aidevcontainer/allowed-domains.txt"),
        run_dir=Path("/run/initd"),
        state_dir=Path("/var/lib/initd"),
        workspace=Path("/workspace"),
        claude_uid=501,
        claude_gid=501,
        warden_user="_initd",
        backend="auto",
        verify="strict",
        dns_floor=60.0,
        dns_grace=30.0,
        resolve_timeout=10.0,
        stop_grace=8.0,
        log_format="auto",
        log_level="info",
        metrics_file="",
        mode="enforce",
        require="",
    )


def test_required_capabilities_are_a_list_or_text(tmp_path):
    assert load({**NO_FILE, "INITD_REQUIRE": "ipv6, dns ipv6"}).require == "dns,ipv6"
    (tmp_path / "initd.toml").write_text('require = ["nflog", "dns"]\n')
    assert load({"INITD_SETTINGS": str(tmp_path / "initd.toml")}).require == "dns,nflog"
    with pytest.raises(ConfigError, match=r"INITD_REQUIRE: 'ipv5' is not one of .*\nhint: did you mean ipv"):
        load({**NO_FILE, "INITD_REQUIRE": "ipv5"})
    (tmp_path / "initd.toml").write_text("require = 6\n")
    with pytest.raises(ConfigError, match="require: 6 is not a list of names"):
        load({"INITD_SETTINGS": str(tmp_path / "initd.toml")})


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        load(NO_FILE).backend = "nftables"


def test_other_variables_are_none_of_our_business():
    assert load(
        {**NO_FILE, "PATH": "/bin", "CLAUDE_CONFIG_DIR": "x", "NOT_INITD_X": "y", "initd_backend": "z"}
    ) == load(NO_FILE)


def test_variables():
    seen = load(
        {
            **NO_FILE,
            "INITD_POLICY": "/etc/policy",
            "INITD_BACKEND": "NFTables",
            "INITD_DNS_FLOOR": "0090",
            "INITD_STOP_GRACE": "0.25",
            "CLAUDE_UID": "1000",
            "CLAUDE_GID": "4294967294",
            "INITD_WARDEN_USER": "65534",
        }
    )
    assert (seen.policy, seen.backend, seen.dns_floor, seen.stop_grace) == (Path("/etc/policy"), "nftables", 90.0, 0.25)
    assert (seen.claude_uid, seen.claude_gid, seen.warden_user) == (1000, MAX_ID, "65534")


def test_file(tmp_path):
    seen = load(
        with_file(
            tmp_path,
            'backend = "xtables"\r\ndns_floor = 5\ndns_grace = 0.5\nclaude_uid = 1000\nclaude_gid = "1001"\n'
            'run_dir = "/tmp/run"\nwarden_user = 999\n',
        )
    )
    assert (seen.backend, seen.dns_floor, seen.dns_grace) == ("xtables", 5.0, 0.5)
    assert (seen.claude_uid, seen.claude_gid, seen.warden_user, seen.run_dir) == (1000, 1001, "999", Path("/tmp/run"))


def test_environment_wins_over_the_file_and_empty_is_unset(tmp_path):
    environ = with_file(tmp_path, 'backend = "xtables"\nverify = "off"\n', INITD_BACKEND="nftables", INITD_VERIFY="")
    seen = load(environ)
    assert (seen.backend, seen.verify) == ("nftables", "off")


def test_a_bad_value_in_the_file_is_not_looked_at_when_the_environment_wins(tmp_path):
    assert load(with_file(tmp_path, 'backend = "x"\n', INITD_BACKEND="nftables")).backend == "nftables"


def test_which_file():
    assert settings_file({}) == Path("/workspace/.aidevcontainer/initd.toml")
    assert settings_file({"INITD_SETTINGS": ""}) is None
    assert settings_file({"INITD_SETTINGS": "/x"}) == Path("/x")


def test_usual_file_may_be_absent_but_a_named_one_may_not(monkeypatch, tmp_path):
    monkeypatch.setattr("initd.settings.DEFAULT_FILE", tmp_path / "initd.toml")
    assert load({}) == load(NO_FILE)
    (tmp_path / "initd.toml").write_text('verify = "warn"\n')
    assert load({}).verify == "warn"
    assert refused({"INITD_SETTINGS": "/nope/initd.toml"}) == [
        "INITD_SETTINGS: /nope/initd.toml is not there",
        "hint: create it, or correct the path",
    ]


# ---- problems


def test_all_problems_at_once_each_with_its_place(tmp_path):
    environ = with_file(
        tmp_path,
        'dns_flor = 60\nbackend = "iptables"\ndns_grace = "soon"\nclaude_gid = 0\n[dns]\nfloor = 1\n',
        INITD_BACKENT="nftables",
        INITD_FOO="1",
        INITD_VERIFY="of",
        INITD_RUN_DIR="run",
        CLAUDE_UID="0",
    )
    file = tmp_path / "initd.toml"
    assert refused(environ) == [
        f"{file}: unknown key 'dns'",
        "hint: docs/policy.md lists the settings",
        f"{file}: unknown key 'dns_flor'",
        "hint: did you mean dns_floor?",
        "INITD_BACKENT: unknown variable",
        "hint: did you mean INITD_BACKEND?",
        "INITD_FOO: unknown variable",
        "hint: docs/policy.md lists the settings",
        "INITD_RUN_DIR: 'run' is not an absolute path",
        "CLAUDE_UID: 0 is root, and sessions must not be root",
        f"{file}: claude_gid: 0 is root, and sessions must not be root",
        f"{file}: backend: 'iptables' is not one of auto, xtables, nftables",
        "hint: did you mean xtables?",
        "INITD_VERIFY: 'of' is not one of strict, warn, off",
        "hint: did you mean off?",
        f"{file}: dns_grace: 'soon' is not a number of seconds (no unit, as in 60 or 0.5)",
    ]


def test_process_protocol_is_known():
    assert load({**NO_FILE, **dict.fromkeys(PROTOCOL, "x")}) == load(NO_FILE)
    assert "INITD_FDZ: unknown variable" in refused({**NO_FILE, "INITD_FDZ": "x"})


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CLAUDE_UID", "0", "0 is root, and sessions must not be root"),
        ("CLAUDE_UID", "00", "0 is root, and sessions must not be root"),
        ("CLAUDE_GID", "0", "0 is root, and sessions must not be root"),
        ("CLAUDE_UID", "4294967295", "4294967295 is above 4294967294, the largest that the kernel has"),
        ("CLAUDE_UID", "-1", "'-1' is neither a number nor 'auto'"),
        ("CLAUDE_UID", "501.0", "'501.0' is neither a number nor 'auto'"),
        ("CLAUDE_UID", "claude", "'claude' is neither a number nor 'auto'"),
        ("CLAUDE_UID", "\u0665", "'\u0665' is neither a number nor 'auto'"),
        ("CLAUDE_UID", "9" * 5000, f"'{'9' * 59} is neither a number nor 'auto'"),
        ("INITD_DNS_FLOOR", "0", "0 is not between 1 and 86400 seconds"),
        ("INITD_DNS_FLOOR", "1m", "'1m' is not a number of seconds (no unit, as in 60 or 0.5)"),
        ("INITD_DNS_FLOOR", "nan", "nan is not between 1 and 86400 seconds"),
        ("INITD_DNS_GRACE", "-1", "-1 is not between 0 and 86400 seconds"),
        ("INITD_STOP_GRACE", "inf", "inf is not between 0 and 3600 seconds"),
        ("INITD_RESOLVE_TIMEOUT", "0", "0 is not between 0.1 and 600 seconds"),
        ("INITD_POLICY", "relative/path", "'relative/path' is not an absolute path"),
        ("INITD_WARDEN_USER", "a:b", "'a:b' is neither a user's name nor a UID"),
        ("INITD_LOG_LEVEL", "loud", "'loud' is not one of debug, info, warning, error"),
    ],
)
def test_values_that_are_refused(variable, value, reason):
    assert refused({**NO_FILE, variable: value})[0] == f"{variable}: {reason}"


@pytest.mark.parametrize("user", ["root", "0", "00"])
def test_the_warden_is_not_root(user):
    assert refused({**NO_FILE, "INITD_WARDEN_USER": user})[0].startswith(
        "INITD_WARDEN_USER: the warden must not be root"
    )


@pytest.mark.parametrize(("user", "uid"), [("1234", "1234"), ("nobody", "65534")])
def test_sessions_must_not_be_the_warden(user, uid):
    assert refused({**NO_FILE, "INITD_WARDEN_USER": user, "CLAUDE_UID": uid}) == [
        f"CLAUDE_UID: {uid} is the warden's own user ({user})",
        "hint: sessions need another one",
    ]
    assert load({**NO_FILE, "INITD_WARDEN_USER": user, "CLAUDE_UID": "1235"}).warden_user == user


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("dns_floor = true", "dns_floor: True is not a number of seconds (no unit, as in 60 or 0.5)"),
        ("dns_floor = nan", "dns_floor: nan is not between 1 and 86400 seconds"),
        ("dns_floor = [1]", "dns_floor: [1] is not a number of seconds (no unit, as in 60 or 0.5)"),
        ("claude_uid = true", "claude_uid: True is neither a number nor 'auto'"),
        ("claude_uid = 501.5", "claude_uid: 501.5 is neither a number nor 'auto'"),
        ("claude_uid = -5", "claude_uid: -5 is neither a number nor 'auto'"),
        ("backend = 1", "backend: 1 is not one of auto, xtables, nftables"),
        ("policy = 1", "policy: 1 is not an absolute path"),
        ('policy = "/a\\u0000b"', "policy: '/a\\x00b' is not an absolute path"),
        ("warden_user = false", "warden_user: False is neither a user's name nor a UID"),
        ("INITD_BACKEND = 1", "unknown key 'INITD_BACKEND'"),
        ('settings = "x"', "unknown key 'settings'"),
    ],
)
def test_wrong_types_in_the_file(tmp_path, text, reason):
    assert refused(with_file(tmp_path, text))[0] == f"{tmp_path}/initd.toml: {reason}"


# ---- the file itself


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"backend = nftables\n", ": not TOML: "),
        (b"backend = 'a'\nbackend = 'b'\n", ": not TOML: "),
        (b"backend", ": not TOML: "),
        (b"# ok\n# \xff\n", ":2: not UTF-8"),
        (b"\0\0", ": not TOML: "),
        (b"x = " + b"[" * 20_000, ": not TOML: nested too deeply"),
        (b"#" * (FILE_LIMIT + 1), " is larger than 64 KiB"),
    ],
)
def test_malformed_file(tmp_path, raw, reason):
    assert refused(with_file(tmp_path, raw))[0].startswith(f"{tmp_path}/initd.toml{reason}")


def test_file_with_a_bom_and_the_largest_file(tmp_path):
    assert load(with_file(tmp_path, b'\xef\xbb\xbfverify = "off"\n')).verify == "off"
    assert load(with_file(tmp_path, b"#" * FILE_LIMIT)) == load(NO_FILE)


def test_directory_and_fifo_and_other_problems_are_reported_together(tmp_path):
    assert refused({"INITD_SETTINGS": str(tmp_path), "INITD_VERIFY": "x"}) == [
        f"{tmp_path} is a directory, not a regular file",
        "hint: put a file there; an engine makes a directory when the source of a bind mount is missing",
        "INITD_VERIFY: 'x' is not one of strict, warn, off",
    ]
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(refused({"INITD_SETTINGS": str(fifo)})), daemon=True)
    thread.start()
    thread.join(5)
    assert seen[0] == f"{fifo} is a FIFO, not a regular file"


# ---- auto


@pytest.fixture
def workspace(tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    path = tmp_path / "workspace"
    path.mkdir()
    return path


def test_auto_takes_the_owner(workspace):
    os.chown(workspace, 1234, 5678)
    environ = {**NO_FILE, "INITD_WORKSPACE": str(workspace)}
    seen = load({**environ, "CLAUDE_UID": "auto"})
    assert (seen.claude_uid, seen.claude_gid) == (1234, 5678)
    seen = load({**environ, "CLAUDE_UID": "auto", "CLAUDE_GID": "99"})
    assert (seen.claude_uid, seen.claude_gid) == (1234, 99)
    seen = load({**environ, "CLAUDE_GID": "auto"})
    assert (seen.claude_uid, seen.claude_gid) == (501, 5678)


def test_auto_refuses_root(workspace):
    environ = {**NO_FILE, "INITD_WORKSPACE": str(workspace), "CLAUDE_UID": "auto"}
    assert f"CLAUDE_UID: 'auto', but {workspace} belongs to root" in refused(environ)
    os.chown(workspace, 1234, 0)
    assert refused(environ) == [
        f"CLAUDE_UID: 'auto', but {workspace} belongs to root's group",
        "hint: set the number that your files belong to",
    ]


def test_auto_without_a_workspace(tmp_path):
    environ = {**NO_FILE, "INITD_WORKSPACE": str(tmp_path / "none"), "CLAUDE_UID": "auto"}
    assert refused(environ)[0] == f"CLAUDE_UID: 'auto' needs {tmp_path}/none: No such file or directory"


def test_auto_of_the_warden_is_refused_too(workspace):
    os.chown(workspace, 1234, 1234)
    environ = {**NO_FILE, "INITD_WORKSPACE": str(workspace), "CLAUDE_UID": "auto", "INITD_WARDEN_USER": "1234"}
    assert refused(environ)[0] == "CLAUDE_UID: 1234 is the warden's own user (1234)"


# ---- handing down

PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20).map(
    lambda text: Path("/" + text)
)
VALUES = st.builds(
    Settings,
    policy=PATHS,
    run_dir=PATHS,
    state_dir=PATHS,
    workspace=PATHS,
    claude_uid=st.integers(1, MAX_ID),
    claude_gid=st.integers(1, MAX_ID),
    warden_user=st.sampled_from(["_initd", "no such user", "name-1"]),
    backend=st.sampled_from(["auto", "xtables", "nftables"]),
    verify=st.sampled_from(["strict", "warn", "off"]),
    dns_floor=st.floats(1, 86_400),
    dns_grace=st.floats(0, 86_400),
    resolve_timeout=st.floats(0.1, 600),
    stop_grace=st.floats(0, 3600),
    log_format=st.sampled_from(["auto", "console", "json"]),
    log_level=st.sampled_from(["debug", "info", "warning", "error"]),
    metrics_file=st.sampled_from(["", "/run/initd/initd.prom"]),
    mode=st.sampled_from(["enforce", "audit"]),
    require=st.lists(st.sampled_from(CAPABILITIES), unique=True).map(lambda names: ",".join(sorted(names))),
)


@settings(deadline=None)
@given(VALUES)
def test_environ_round_trips_without_a_file(value):
    environ = value.environ()
    assert environ["INITD_SETTINGS"] == ""
    assert set(environ) == {"INITD_SETTINGS", *(field.variable for field in FIELDS.values())}
    assert load(environ) == value


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([field.variable for field in FIELDS.values()]), st.text(max_size=12), min_size=1, max_size=6
    )
)
def test_any_environment_is_settings_or_a_config_error(environ):
    try:
        seen = load({**NO_FILE, **environ})
    except ConfigError as error:
        seen = error
    assert isinstance(seen, (Settings, ConfigError))


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: f"backend = {text}".encode())))
def test_any_file_is_settings_or_a_config_error(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(raw)
    try:
        seen = load({"INITD_SETTINGS": str(path)})
    except ConfigError as error:
        seen = error
    assert isinstance(seen, (Settings, ConfigError))


# ---- PID 1 waits for this import


def test_import_is_light():
    """No dataclasses, inspect, tomllib or difflib: they would double it."""
    code = "import sys; before = set(sys.modules); import initd.settings; print(*sorted(set(sys.modules) - before))"
    started = time.monotonic()
    output = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert time.monotonic() - started < 20
    loaded = set(output.split())
    assert "initd.settings" in loaded
    assert not loaded & {"dataclasses", "inspect", "tomllib", "difflib", "initd.core", "asyncio", "ssl"}
