"""Tables fit the terminal, and what one acts on is cut last."""

from __future__ import annotations

import pytest

from initd import narrative

ROWS = [("packages.a.example:443/tcp", "12", "not listed", "claude, pid 7: node a-rather-long-command-line --verbose")]


def table(width: int | None, *, wrap: bool = False) -> list[str]:
    titles = ("WHAT", "COUNT", "WHY", "BY")
    return narrative.table(titles, ROWS, width=width, color=False, wrap=wrap).splitlines()


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_first_column_is_whole_and_the_line_fits(width):
    title, row = table(width)
    assert max(len(title), len(row)) <= width
    assert row.startswith(ROWS[0][0])
    assert row.endswith("…")


def test_a_pipe_gets_everything():
    assert table(None)[1].endswith(ROWS[0][3])


def test_what_is_told_in_the_last_column_goes_on_below():
    _, *rows = table(76, wrap=True)
    assert len(rows) > 1
    assert max(map(len, rows)) <= 76
    assert " ".join(" ".join(rows).split()).endswith(ROWS[0][3])


def suggested(**more: object) -> str:
    answer = {"lines": [], "lines_total": 0, "skipped": [], "written": None, "to": None, "command": "RELOAD"}
    return narrative.suggest({**answer, **more}, color=False)


def test_lines_added_are_counted():
    assert suggested(written=["a:1"], to="F") == "# 1 line added to F; put into force by: RELOAD"
    assert suggested(written=["a:1", "b:2"], to="F").startswith("# 2 lines added to F;")
    assert suggested(written=[], to="F") == "# nothing added: F has every line"
