"""A workspace that sessions cannot write is said with what to set."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from initd.health import workspace


@pytest.mark.skipif(os.geteuid() != 0, reason="gives folders away: needs root")
@pytest.mark.parametrize(
    ("owner", "mode", "ok", "words"),
    [
        (1000, 0o755, False, "NOT writable for 501:501; set CLAUDE_UID=1000 CLAUDE_GID=1000"),
        (0, 0o755, False, "NOT writable for 501:501; chown it on the host"),
        (501, 0o755, True, "writable for 501:501"),
        (1000, 0o777, True, "writable for 501:501"),
    ],
)
def test_workspace(tmp_path, owner, mode, ok, words):
    tmp_path.chmod(mode)
    os.chown(tmp_path, owner, owner)
    seen = workspace(SimpleNamespace(workspace=tmp_path, claude_uid=501, claude_gid=501))
    assert seen["ok"] is ok
    assert seen["detail"].endswith(f": {words}")
