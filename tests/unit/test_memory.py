from __future__ import annotations

import dataclasses
from ipaddress import ip_network
from pathlib import Path

import pytest

from initd import memory
from initd.core.leases import WILD_MOST, from_state
from initd.core.policy import Feed
from initd.published import replace

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
    replace(path, memory.dump(FULL))
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


def test_what_a_session_makes_us_remember_can_be_read_back(tmp_path: Path) -> None:
    """As many leases as names below a wildcard can have, each name as long as names are."""
    name = "{:063d}." + f"{'a' * 63}." * 2 + f"{'b' * 53}.example"
    leases = {name.format(number): {"2001:db8:1111:2222:3333:4444:5555:6666": 86430} for number in range(WILD_MOST)}
    assert len(next(iter(leases))) == 253
    path = tmp_path / "state.toml"
    replace(path, memory.dump(dataclasses.replace(FULL, leases=leases)))
    found = memory.load(path)
    assert found is not None
    assert len(from_state(found.leases)) == WILD_MOST


def test_a_failed_save_keeps_the_old_document(tmp_path: Path) -> None:
    path = tmp_path / "state.toml"
    replace(path, memory.dump(FULL))
    with pytest.raises(UnicodeEncodeError):
        replace(path, "\ud800")
    assert memory.load(path) == FULL
    assert [one.name for one in tmp_path.iterdir()] == ["state.toml"]
