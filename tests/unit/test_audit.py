"""Audit mode's note: it can end the mode early, never begin it or make it longer."""

from __future__ import annotations

import json
import os

import pytest

from initd import audit
from initd.audit import Audit
from initd.settings import load

NOW = 1000.0


@pytest.fixture
def settings(tmp_path):
    return load({"INITD_SETTINGS": "", "INITD_RUN_DIR": str(tmp_path)})


@pytest.fixture
def always(settings):
    return settings._replace(mode="audit")


def begin(settings, *, resuming=True, now=NOW):
    return audit.begin(settings, resuming=resuming, now=now)


def test_what_is_left_is_taken_up_and_never_more(settings):
    audit.note(settings.run_dir / audit.FILE, Audit(NOW + 60))
    assert begin(settings) == Audit(NOW + 60)
    assert begin(settings, now=NOW + 59) == Audit(NOW + 60)
    for later in (60, 10_000):  # what it let through is still to be closed
        found = begin(settings, now=NOW + later)
        assert found is not None
        assert found.over(NOW + later)


def test_a_box_starts_as_its_settings_say_whatever_was_before(settings, always):
    audit.note(settings.run_dir / audit.FILE, Audit(NOW + 60))
    assert begin(settings, resuming=False) is None
    assert begin(settings) is None
    assert begin(always, resuming=False) == Audit(None)
    assert begin(always) == Audit(None)


def test_switched_off_stays_off_in_a_box_that_began_with_it(always):
    begin(always, resuming=False)
    audit.note(always.run_dir / audit.FILE, None)
    assert begin(always) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "null", '"audit"', "\xff", '{"audit": true}', '{"audit": 1, "until": 1060}',
        '{"audit": true, "until": null}', '{"audit": true, "until": "soon"}', '{"audit": true, "until": []}',
        '{"audit": true, "until": 1e300}', '{"audit": true, "until": NaN}', '{"audit": true, "until": Infinity}',
        '{"audit": true, "until": 87401}',
        " " * 5000 + '{"audit": true, "until": 1060}',
    ],
)  # fmt: skip
def test_a_damaged_note_enforces(settings, text):
    (settings.run_dir / audit.FILE).write_text(text, encoding="latin-1")
    assert begin(settings) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")
def test_somebody_elses_note_enforces(settings):
    path = settings.run_dir / audit.FILE
    audit.note(path, Audit(NOW + 60))
    assert begin(settings) is not None, "negative control"
    os.chown(path, 501, 501)
    assert begin(settings) is None


def test_a_link_and_nothing_enforce(settings, always, tmp_path):
    assert begin(settings) is None
    assert begin(always) is None
    (tmp_path / "note").write_text(json.dumps({"audit": True, "until": NOW + 60}))
    (settings.run_dir / audit.FILE).symlink_to(tmp_path / "note")
    assert begin(settings) is None


def test_a_first_note_that_cannot_be_written_enforces(always):
    assert begin(always._replace(run_dir=always.run_dir / "missing"), resuming=False) is None


def test_what_is_left():
    assert (Audit(NOW + 5).left(NOW), Audit(NOW).left(NOW + 5), Audit(None).left(NOW)) == (5, 0, None)
    assert (Audit(NOW + 5).over(NOW), Audit(NOW).over(NOW), Audit(None).over(1e12)) == (False, True, False)
