"""Shell completion for bash, zsh and fish, made from the command line's own parser. Pure: a parser in, text out."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FILES = frozenset({"FILE"})
"""Metavariables that stand for a file."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its spellings, its help, and the metavariable of its value, if it takes one."""

    names: tuple[str, ...]
    text: str
    value: str | None


@dataclass(frozen=True, slots=True)
class Command:
    """One command: `words` are what its argument may be, `files` whether it may be a file."""

    name: str
    text: str
    options: tuple[Option, ...]
    words: tuple[str, ...]
    files: bool


def commands_of(parser: argparse.ArgumentParser) -> list[Command]:
    """What the parser's commands take."""
    (sub,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))  # noqa: SLF001
    texts = {one.dest: one.help or "" for one in sub._choices_actions}  # noqa: SLF001
    return [_command(name, texts[name], one) for name, one in sub.choices.items()]


def _command(name: str, text: str, parser: argparse.ArgumentParser) -> Command:
    actions = parser._actions  # noqa: SLF001
    options = tuple(
        Option(tuple(one.option_strings), one.help or "", None if one.nargs == 0 else str(one.metavar))
        for one in actions
        if one.option_strings
    )
    plain = [one for one in actions if not one.option_strings]
    words = tuple(str(word) for one in plain for word in one.choices or ())
    return Command(name, text, options, words, any(one.metavar in FILES for one in plain))


def bash(parser: argparse.ArgumentParser) -> str:
    """For /usr/share/bash-completion/completions, or to be sourced."""
    made = commands_of(parser)
    cases = "\n".join(f"        {one.name}) {_bash_case(one)} ;;" for one in made)
    return f"""\
# bash completion for fwctl; made by `fwctl completion bash`
_fwctl() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} command= words= files= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ ${{COMP_WORDS[i]}} == -* ]] || {{ command=${{COMP_WORDS[i]}}; break; }}
    done
    case $command in
        '') words='{" ".join(one.name for one in made)} --help --version' ;;
{cases}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur"; [[ -z $files ]] || compgen -f -- "$cur")
}}
complete -F _fwctl fwctl
"""


def _bash_case(command: Command) -> str:
    words = " ".join([*_spellings(command), *command.words])
    return f"words='{words}'" + (" files=1" if _takes_files(command) else "")


def zsh(parser: argparse.ArgumentParser) -> str:
    """For a folder in $fpath, as _fwctl."""
    made = commands_of(parser)
    listed = "\n".join(f"        {_quoted(f'{one.name}:{one.text}')}" for one in made)
    cases = "\n".join(f"        {one.name}) _arguments {' '.join(_arguments(one))} ;;" for one in made)
    return f"""\
#compdef fwctl
# zsh completion for fwctl; made by `fwctl completion zsh`
_fwctl() {{
    local curcontext=$curcontext state line
    local -a commands=(
{listed}
    )
    _arguments -C '(- *)'{{-h,--help}}'[show help]' '(- *)--version[show the version]' '1: :->command' '*:: :->rest'
    case $state in
        command) _describe command commands ;;
        rest) _fwctl_rest $words[1] ;;
    esac
}}
_fwctl_rest() {{
    case $1 in
{cases}
    esac
}}
_fwctl "$@"
"""


def fish(parser: argparse.ArgumentParser) -> str:
    """For /usr/share/fish/vendor_completions.d."""
    lines = ["# fish completion for fwctl; made by `fwctl completion fish`", "complete -c fwctl -f"]
    for one in commands_of(parser):
        lines.append(f"complete -c fwctl -n __fish_use_subcommand -a {one.name} -d {_fish_quoted(one.text)}")
        here = f"complete -c fwctl -n '__fish_seen_subcommand_from {one.name}'"
        for option in one.options:
            spelled = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            value = " -r" + (" -F" if option.value in FILES else "") if option.value else ""
            lines.append(f"{here} {spelled}{value} -d {_fish_quoted(option.text)}")
        if one.words:
            lines.append(f"{here} -a '{' '.join(one.words)}'")
        if one.files:
            lines.append(f"{here} -F")
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[argparse.ArgumentParser], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def _spellings(command: Command) -> Iterator[str]:
    for option in command.options:
        yield from option.names


def _takes_files(command: Command) -> bool:
    return command.files or any(option.value in FILES for option in command.options)


def _arguments(command: Command) -> Iterator[str]:
    """The specifications of zsh's _arguments (zshcompsys(1))."""
    for option in command.options:
        text = option.text.replace("[", "(").replace("]", ")").replace(":", ";")
        value = f":{option.value}:{'_files' if option.value in FILES else ''}" if option.value else ""
        for name in option.names:
            yield _quoted(f"{name}[{text}]{value}")
    if command.files:
        yield "'*:file:_files'"
    if command.words:
        yield _quoted(f"1:word:({' '.join(command.words)})")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
