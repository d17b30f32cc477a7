"""What the warden writes for others to read."""

from __future__ import annotations

import os
from pathlib import Path

from initd.published import replace


def test_no_link_is_followed(tmp_path: Path) -> None:
    target, file = tmp_path / "state.toml", tmp_path / "metrics.prom"
    target.write_text("state")
    planted = tmp_path / f".{file.name}.{os.getpid()}"
    for one in (planted, file):
        one.symlink_to(target)
    assert planted.read_text() == "state", "negative control: it leads there"
    replace(file, "figures")
    assert target.read_text() == "state"
    assert (file.read_text(), file.is_symlink(), planted.exists()) == ("figures", False, False)
    assert file.stat().st_mode & 0o777 == 0o644
