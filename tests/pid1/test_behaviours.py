"""Every row of docs/init.md, for initd as PID 1 and below another init."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from tests.pid1.behaviours import BEHAVIOURS, terminal

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda function: function.__name__)
def test_pid_1(behaviour, box):
    behaviour(partial(box, init="initd"))


def test_a_terminal_that_controls_nothing_yet_becomes_the_commands(box):
    one, master = terminal(box, "bash", "--norc", "-i", controlling=False)
    os.write(master, b"case $- in *m*) exit 5;; *) exit 6;; esac\n")
    assert one.wait() == 5
    os.close(master)


def test_the_published_matrix_is_of_these_rows():
    """docs/init.md has a row for each behaviour, and its initd column is what test_pid_1 asserts."""
    lines = (Path(__file__).parents[2] / "docs" / "init.md").read_text().splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert table[0][:2] == ["behaviour", "initd"]
    assert [row[:2] for row in table[1:]] == [[behaviour.__doc__, "yes"] for behaviour in BEHAVIOURS]
