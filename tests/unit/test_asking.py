"""What `fwctl` says when no warden answers: the keeper's own word on it, where there is one."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from initd.asking import UnavailableError, ask
from initd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run directory of a box whose warden takes one question and dies of it."""
    monkeypatch.setenv("INITD_RUN_DIR", str(tmp_path))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "control.sock"))
        server.listen()

        def die() -> None:
            server.accept()[0].close()

        thread = threading.Thread(target=die)
        thread.start()
        yield tmp_path
        thread.join(5)


def test_the_keepers_word_is_the_hint(dying: Path) -> None:
    (dying / "restarting").write_text("the warden has ended 5x; the next is started 1.6 s later\n")
    with pytest.raises(UnavailableError) as caught:
        ask("status")
    assert caught.value.hint == "the warden has ended 5x; the next is started 1.6 s later; see the box's log"
    assert caught.value.code == 69


def test_without_it_the_hint_is_a_guess(dying: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        ask("status")
    assert caught.value.hint is not None
    assert "may be restarting" in caught.value.hint
    assert caught.value.message == "no answer from the warden: it closed the connection"


def test_no_box_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INITD_RUN_DIR", str(tmp_path))
    with pytest.raises(UnavailableError, match="no box is running here"):
        ask("status")


def test_what_no_warden_would_read_is_not_sent() -> None:
    with pytest.raises(ConfigError, match="longer than 65536 bytes"):
        ask("test", target="x" * 70_000)
