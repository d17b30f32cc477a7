"""The account follows the session user, and what is not the account's stays as it is."""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path

import pytest

from initd import account
from initd.errors import PrivilegeError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away: needs root")
PASSWD = "root:x:0:0:root:/root:/bin/bash\nclaude:x:501:501::/home/claude:/bin/bash\n_initd:x:401:401::/:/bin/false\n"
GROUP = "root:x:0:\nstaff:x:20:\nclaude:x:501:\n"


@pytest.fixture
def image():
    """A little image: its account files, and a home with a folder that only its owner may enter."""
    with tempfile.TemporaryDirectory(prefix="initd-account-") as name:  # pytest's own folders are closed to others
        yield fill(Path(name))


def fill(tmp_path):
    tmp_path.chmod(0o755)
    home = tmp_path / "home"
    volume = home / ".claude"
    (volume / "deep").mkdir(parents=True)
    (volume / "deep" / "file").write_text("x")
    (volume / "link").symlink_to("/etc/passwd")
    (volume / "root's").write_text("x")
    for path in (home, volume, volume / "deep", volume / "deep" / "file", volume / "link"):
        os.chown(path, 501, 501, follow_symlinks=False)
    for path in (home, volume, volume / "deep"):
        path.chmod(0o700)
    (tmp_path / "passwd").write_text(PASSWD)
    (tmp_path / "group").write_text(GROUP)
    (tmp_path / "mark").write_text(f"claude\n{home}\n{volume}\n")
    return tmp_path


def follow(image, uid, gid):
    account.follow(uid, gid, mark=str(image / "mark"), passwd=str(image / "passwd"), group=str(image / "group"))


def owners(image):
    found = {}
    for path in (image / "home", *(image / "home").rglob("*")):
        info = path.lstat()
        found[path.name] = (info.st_uid, info.st_gid)
    return found


def test_files_and_folders_follow(image):
    before = Path("/etc/passwd").stat()
    follow(image, 1000, 1001)
    found = owners(image)
    assert found.pop("root's") == (0, 0)
    assert set(found.values()) == {(1000, 1001)}
    assert Path("/etc/passwd").stat().st_uid == before.st_uid
    follow(image, 1234, 1234)
    assert owners(image)["file"] == (1234, 1234)


def test_passwd_and_group_follow(image):
    follow(image, 1000, 1001)
    assert (image / "passwd").read_text() == PASSWD.replace("501:501", "1000:1001")
    assert (image / "group").read_text() == GROUP.replace("501", "1001")


def test_a_group_that_exists_stays(image):
    """macOS: GID 20."""
    follow(image, 1000, 20)
    assert (image / "group").read_text() == GROUP


def test_a_volume_of_another_life(image):
    """The home is the image's, the volume was given to another UID before: both come together."""
    for path in (image / "home" / ".claude", *(image / "home" / ".claude").rglob("*")):
        os.chown(path, 4242, 4242, follow_symlinks=False)
    follow(image, 1000, 1000)
    assert set(owners(image).values()) == {(1000, 1000)}


def test_a_mount_inside_is_left_alone(image, monkeypatch):
    mounted = image / "home" / "theirs"
    mounted.write_text("x")
    os.chown(mounted, 501, 501)
    (image / "mountinfo").write_text(f"36 35 98:0 / {mounted} rw - ext4 /dev/root rw\n")
    monkeypatch.setattr(account, "MOUNTS", str(image / "mountinfo"))
    follow(image, 1000, 1000)
    assert owners(image)["theirs"] == (501, 501)
    assert owners(image)["file"] == (1000, 1000)


def test_without_a_mark_nothing_happens(image):
    (image / "mark").unlink()
    follow(image, 1000, 1000)
    assert (image / "passwd").read_text() == PASSWD
    assert owners(image)["file"] == (501, 501)


def test_it_is_root_again_afterwards(image):
    follow(image, 1000, 1000)
    assert (os.getuid(), os.geteuid()) == (0, 0)
    os.chown(image / "passwd", 1, 1)


def test_what_cannot_be_written_is_said_in_words(image):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a full disk
    try:
        with pytest.raises(PrivilegeError, match="claude cannot become 1000:1001: .*File too large") as caught:
            follow(image, 1000, 1001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "build the image" in str(caught.value)
    assert (image / "passwd").read_text() == PASSWD
    assert (image / "group").read_text() == GROUP
