"""The demo succeeds, prints a line a step, and fails when the product's promise is not kept."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support import demo, transcript
from tests.support.lab import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kernel


def test_demo_tells_every_step_and_succeeds() -> None:
    argv = [sys.executable, "-m", "tests.support.demo"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" s  ok  ") == len(demo.STEPS) + 1
    assert "\x1b" not in done.stdout, "colour is for terminals"
    assert transcript.essence(done.stdout) == transcript.essence(transcript.quoted()), "run `make docs`"


def test_demo_fails_when_the_unlisted_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wider = tmp_path / "allowed-domains.txt"
    wider.write_text(f"{demo.POLICY.read_text()}\n{demo.UNLISTED}\n")
    monkeypatch.setattr(demo, "POLICY", wider)
    assert demo.main() == 1
    told = capsys.readouterr()
    assert "FAILED  unlisted: StepError: by name" in told.out
    assert "The box's log:" in told.err
