"""`fwctl`'s explaining commands: times, files, tables."""

from __future__ import annotations

import os
from datetime import datetime

import pytest

from initd import inquiry, narrative
from initd.core.spans import parse_span, show_span
from initd.errors import ConfigError, UsageError

NOW = datetime(2026, 3, 4, 12, 0, 0).astimezone().timestamp()


@pytest.mark.parametrize(
    ("text", "before"),
    [("30m", 1800), ("1h30m", 5400), ("2d", 172_800), ("10:30", 5400), ("9:30", 9000), ("2026-03-04T11:00", 3600)],
)
def test_moments(text, before):
    assert inquiry.moment(text, NOW) == NOW - before


@pytest.mark.parametrize("text", ["", "5", "-3m", "yesterday", "25:00", "1h 30m", "9" * 30 + "h", "٣m"])
def test_what_is_no_moment(text):
    with pytest.raises(UsageError):
        inquiry.moment(text, NOW)


def test_spans():
    assert [show_span(parse_span(one)) for one in ("45s", "90m", "1d2h3m")] == ["45s", "1h 30m", "1d 2h"]


def test_only_missing_lines_are_appended(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a.example # why\nb.example")
    assert inquiry.append(str(path), ["a.example", "c.example:22\nc.example:53/udp"]) == [
        "c.example:22",
        "c.example:53/udp",
    ]
    assert path.read_text() == "a.example # why\nb.example\nc.example:22\nc.example:53/udp\n"


def test_a_new_file_keeps_the_defaults_that_it_replaces(tmp_path):
    inquiry.append(str(tmp_path / "new"), ["c.example"], begin="@github\n")
    assert (tmp_path / "new").read_text() == "@github\nc.example\n"


def test_a_link_a_folder_and_a_pipe_are_refused(tmp_path):
    (tmp_path / "target").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "."):
        with pytest.raises(ConfigError):
            inquiry.append(str(tmp_path / name), ["a.example"])
    assert (tmp_path / "target").read_text() == ""


@pytest.mark.parametrize("width", [40, 60, 80, 200, None])
def test_tables_fit(width):
    rows = [
        ("a-very-long-name.that-goes-on.example:443/tcp", "12", "3m ago", "not listed", "claude, pid 7: " + "x" * 99)
    ]
    lines = narrative.table(("WHAT", "COUNT", "LAST", "WHY", "BY"), rows, width=width, color=False).splitlines()
    longest = max(map(len, lines))
    assert longest <= (width if width and width >= 60 else 200)
    assert ("…" in lines[1]) is (width is not None and width < 200)
