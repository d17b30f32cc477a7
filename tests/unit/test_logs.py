"""The warden's log never makes it wait: the DNS guard writes it, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CHATTER = """
from initd import logs
from initd.settings import load
log = logs.configure(load({"INITD_SETTINGS": ""}))
for number in range(2000):
    log.info("refused", number=number, subject="x" * 100)
log.warning("long", text="y" * 20_000)
try:
    raise OSError("a bug")
except OSError:
    log.exception("dns.bug")
print("done", flush=True)
"""


def chatter(stderr: int) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", CHATTER], stderr=stderr, stdout=subprocess.PIPE, cwd=root)


def test_a_pipe_that_nobody_reads_makes_nobody_wait() -> None:
    reader, writer = os.pipe()
    with chatter(writer) as process:
        os.close(writer)
        try:
            assert process.communicate(timeout=120)[0] == b"done\n"
        finally:
            process.kill()
    kept = os.read(reader, 1 << 20).decode().splitlines()
    os.close(reader)
    assert [json.loads(line)["number"] for line in kept[:100]] == list(range(100)), "what fits is there, in order"


def test_a_reader_gets_every_line_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file, chatter(file.fileno()) as process:
        assert process.communicate(timeout=120)[0] == b"done\n"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2002
    assert len(lines[-2]["text"]) == 20_000
    assert "a bug" in lines[-1]["exception"]
