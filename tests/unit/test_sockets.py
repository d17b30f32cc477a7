"""What the keeper writes as root into a folder that the warden may write as well."""

from __future__ import annotations

from pathlib import Path

from initd.sockets import publish


def test_a_link_in_the_run_dir_is_replaced_not_followed(tmp_path: Path) -> None:
    target, place = tmp_path / "passwd", tmp_path / "run"
    target.write_text("root")
    place.mkdir()
    (place / "ready.new").symlink_to(target)
    assert (place / "ready.new").read_text() == "root", "negative control: it leads there"
    publish(str(place), "ready", "7\n")
    assert target.read_text() == "root"
    assert (place / "ready").read_text() == "7\n"
    assert not (place / "ready").is_symlink()
