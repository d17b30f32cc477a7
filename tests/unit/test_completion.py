"""Completion knows the parser's every command and option, and the shells take it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from initd import completion, fwctl

COMMANDS = completion.commands_of(fwctl.parser())


def test_the_parser_was_read():
    assert {one.name for one in COMMANDS} == set(fwctl.COMMANDS)
    log = next(one for one in COMMANDS if one.name == "log")
    assert {name for option in log.options for name in option.names} == {
        "-h", "--help", "--json", "-f", "--follow", "--since",
    }  # fmt: skip


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_command_and_option_is_in_it(shell):
    script = completion.SHELLS[shell](fwctl.parser())
    for command in COMMANDS:
        assert command.name in script
        for option in command.options:
            for name in option.names:
                assert (f"-l {name[2:]}" if shell == "fish" and name.startswith("--") else name) in script or (
                    f"-s {name[1:]}" in script
                )


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_shell_takes_it(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"NOT TESTED: there is no {shell} here")
    (tmp_path / "script").write_text(completion.SHELLS[shell](fwctl.parser()))
    done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def complete(tmp_path, *words: str) -> set[str]:
    """What bash offers for the last of these words."""
    (tmp_path / "script").write_text(completion.bash(fwctl.parser()))
    (tmp_path / "folder").mkdir(exist_ok=True)
    (tmp_path / "folder" / "list.txt").touch()
    program = '. ../script; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _fwctl; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", program, "bash", "fwctl", *words],
        cwd=tmp_path / "folder", capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_bash_offers_what_fits(tmp_path):
    assert complete(tmp_path, "") == {*fwctl.COMMANDS, "--help", "--version"}
    assert complete(tmp_path, "s") == {one for one in fwctl.COMMANDS if one.startswith("s")}
    assert complete(tmp_path, "log", "--") == {"--help", "--json", "--follow", "--since"}
    assert complete(tmp_path, "check", "l") == {"list.txt"}
    assert complete(tmp_path, "status", "l") == set(), "negative control: no file fits here"
    assert complete(tmp_path, "completion", "") == {"-h", "--help", "--json", *completion.SHELLS}
