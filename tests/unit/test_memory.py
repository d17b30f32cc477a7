from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from initd import memory
from initd.core.policy import Feed

FULL = memory.State(
    policy='github.com\n# "quoted" \\ back\n',
    source="file",
    saved=1_700_000_000.25,
    upstreams=("203.0.113.53", "2001:db8::53"),
    feeds={Feed.GITHUB: (ip_network("203.0.113.0/24"),)},
    leases={"github.com": {"203.0.113.7": {"expires": 1_700_000_100.0, "services": ["443/tcp"]}}},
)


def test_round_trip_and_world_readable(tmp_path: Path) -> None:
    path = tmp_path / "state.toml"
    memory.save(FULL, path)
    assert memory.load(path) == FULL
    assert path.stat().st_mode & 0o777 == 0o644
    assert [one.name for one in tmp_path.iterdir()] == ["state.toml"]


def test_absent_is_none(tmp_path: Path) -> None:
    assert memory.load(tmp_path / "state.toml") is None


@pytest.mark.parametrize("text", ["", "format = 2", "not toml at all", "format = 1\npolicy = 3", "\xff\xfe"])
def test_what_is_not_ours_is_refused_whole(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="."):
        memory.load(path)


def test_a_failed_save_keeps_the_old_document(tmp_path: Path) -> None:
    path = tmp_path / "state.toml"
    memory.save(FULL, path)
    broken = memory.State(policy="x", source="file", saved=1.0, leases={"x": object()})
    with pytest.raises(TypeError):
        memory.save(broken, path)
    assert memory.load(path) == FULL
    assert [one.name for one in tmp_path.iterdir()] == ["state.toml"]
