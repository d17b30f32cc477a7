"""The command line of initd: what it prints, what it refuses, with which code."""

from __future__ import annotations

import subprocess
import sys

import pytest

import initd


def run(*argv, **options):
    return subprocess.run(
        [sys.executable, "-I", "-m", "initd", *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


def test_help_and_version_go_to_stdout():
    answer = run("--help")
    assert answer.returncode == 0
    assert answer.stdout.startswith("usage: initd ")
    assert answer.stderr == ""
    assert run("--version").stdout == f"initd {initd.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--nonsense"], "unexpected '--nonsense'"),
        (["bash"], "unexpected 'bash': put -- before a command"),
        (["-p"], "'-p' needs a signal name such as TERM"),
        (["-p", "NOSUCH"], "'-p' needs a signal name such as TERM"),
        (["-p", "9; rm"], "'-p' needs a signal name such as TERM"),
        (["keeper", "now"], "'keeper' takes no arguments"),
    ],
)
def test_usage_errors_are_one_line_and_64(argv, says):
    answer = run(*argv)
    assert answer.returncode == 64
    assert answer.stderr == f"initd: {says}; see initd --help\n"
    assert answer.stdout == ""


def test_keeper_by_hand_is_refused_in_words():
    answer = run("keeper")
    assert answer.returncode == 77
    assert answer.stderr.startswith("initd: the keeper is started by initd only")


def test_bad_settings_are_said_once_and_78():
    answer = run(env={"CLAUDE_UID": "0"})
    assert answer.returncode == 78
    assert answer.stderr.count("CLAUDE_UID") == 1
