from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from initd.errors import ConfigError
from initd.files import MissingFileError, read_regular


def refused(path, limit=100):
    with pytest.raises(ConfigError) as caught:
        read_regular(path, limit)
    assert caught.value.code == 78
    assert caught.value.hint
    return caught.value


def test_reads_up_to_the_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_regular(path, 100) == b"x" * 100
    path.write_bytes(b"")
    assert read_regular(path, 100) == b""


def test_one_byte_more_is_refused_without_reading_on(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 101)
    assert refused(path).message == f"{path} is larger than 100 bytes"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it all would take minutes
    started = time.monotonic()
    assert refused(path, 1 << 20).message == f"{path} is larger than 1 MiB"
    assert time.monotonic() - started < 10


def test_limit_counts_bytes_not_the_size_that_stat_tells():
    with pytest.raises(ConfigError, match="larger than 10 bytes"):
        read_regular(Path("/proc/self/status"), 10)


def test_missing_is_a_failure_of_its_own(tmp_path):
    with pytest.raises(MissingFileError, match="is not there"):
        read_regular(tmp_path / "nothing", 100)
    with pytest.raises(MissingFileError):
        read_regular(tmp_path / "no" / "directory", 100)


def test_dangling_link_is_not_missing(tmp_path):
    path = tmp_path / "link"
    path.symlink_to("elsewhere")
    error = refused(path)
    assert not isinstance(error, MissingFileError)
    assert error.message == f"{path} is a link to elsewhere, which is not there"


def test_links_are_followed(tmp_path):
    (tmp_path / "target").write_bytes(b"here")
    (tmp_path / "link").symlink_to("target")
    assert read_regular(tmp_path / "link", 100) == b"here"


def test_loop_of_links(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "cannot be opened" in refused(tmp_path / "a").message


def test_directory(tmp_path):
    assert refused(tmp_path).message == f"{tmp_path} is a directory, not a regular file"


def test_fifo_does_not_hang(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(refused(path).message), daemon=True)
    thread.start()
    thread.join(5)
    assert seen == [f"{path} is a FIFO, not a regular file"]


def test_fifo_with_a_writer_is_refused_too(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(writer, b"github.com\n")
        assert "a FIFO" in refused(path).message
    finally:
        os.close(writer)


def test_device_and_socket(tmp_path):
    assert "a character device" in refused(Path("/dev/zero")).message
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        assert "cannot be opened" in refused(tmp_path / "socket").message


def test_no_descriptor_is_left_open(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 200)
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        refused(tmp_path / "file")
        refused(tmp_path)
    assert set(os.listdir("/proc/self/fd")) == before


def test_path_that_is_none():
    with pytest.raises(ConfigError, match="is not a path"):
        read_regular(Path("a\0b"), 100)


def test_permission(tmp_path):
    """In a child that is nobody, since root may read everything."""
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.getuid() != 0:
        assert "permission denied" in refused(path).message
        return
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.fchdir(os.open(tmp_path, os.O_RDONLY))
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            read_regular(Path("secret"), 100)
        except ConfigError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    assert text.splitlines() == [
        "secret cannot be read by UID 65534: permission denied",
        "hint: chmod a+r secret, and a+x the directories above it",
    ]
