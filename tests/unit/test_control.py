"""The control socket with real connections: who asks is known, what is malformed is answered once."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import structlog

from initd import control as module
from initd.control import Control, Peer
from initd.core import messages
from initd.errors import ConfigError
from tests.support.guarded import Log


async def handle(request: messages.Request, peer: Peer) -> dict[str, Any]:
    if request.op == "reload":
        raise ConfigError("bad file", hint="mend it")
    if request.op == "verify":
        raise RuntimeError("a bug")
    if request.op == "health":
        await asyncio.sleep(0.05)
    return {"op": request.op, "uid": peer.uid, "pid": peer.pid}


async def serve(path: Path, answer: Any = handle, *, log: Any = None) -> Control:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    control = Control(answer, log=log or structlog.get_logger())
    await control.start(listener)
    return control


async def talk(path: Path, *frames: bytes) -> list[dict]:
    reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 20)
    for frame in frames:
        writer.write(frame)
    writer.write_eof()
    lines = [json.loads(line) async for line in reader]
    writer.close()
    return lines


def converse(tmp_path: Path, *frames: bytes) -> list[dict]:
    async def both() -> list[dict]:
        control = await serve(tmp_path / "s")
        try:
            return await talk(tmp_path / "s", *frames)
        finally:
            await control.stop()

    return asyncio.run(both())


def test_the_peer_is_the_kernels_word(tmp_path: Path) -> None:
    (answer,) = converse(tmp_path, messages.request("status"))
    assert answer == {"ok": True, "result": {"op": "status", "uid": os.getuid(), "pid": os.getpid()}}


@pytest.mark.kernel
def test_another_user_is_told_apart(tmp_path: Path) -> None:
    """Negative control: the same request, sent by somebody else."""
    for parent in (tmp_path, *list(tmp_path.parents)[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)

    async def both() -> list[dict]:
        control = await serve(tmp_path / "s")
        (tmp_path / "s").chmod(0o666)
        os.seteuid(501)
        try:
            return await talk(tmp_path / "s", messages.request("status"))
        finally:
            os.seteuid(0)
            await control.stop()

    (answer,) = asyncio.run(both())
    assert answer["result"]["uid"] == 501


def test_several_requests_on_one_connection(tmp_path: Path) -> None:
    answers = converse(tmp_path, messages.request("health"), messages.request("status"))
    assert [one["result"]["op"] for one in answers] == ["health", "status"]


@pytest.mark.parametrize("frame", [b"hello\n", b'{"op":"x"}\n', b"[" * 5000 + b"\n", b"x" * 70_000 + b"\n", b"\0\n"])
def test_malformed_input_is_answered_once_and_closed(tmp_path: Path, frame: bytes) -> None:
    answers = converse(tmp_path, frame, messages.request("status"))
    assert len(answers) == 1
    assert answers[0]["ok"] is False
    assert answers[0]["error"]["code"] == 64


def test_errors_keep_their_code_and_hint(tmp_path: Path) -> None:
    (answer,) = converse(tmp_path, messages.request("reload"))
    assert answer["error"] == {"message": "bad file", "hint": "mend it", "code": 78}


def test_a_bug_in_one_request_ends_neither_the_warden_nor_the_connection(tmp_path: Path) -> None:
    answers = converse(tmp_path, messages.request("verify"), messages.request("status"))
    assert [one["ok"] for one in answers] == [False, True]


def test_what_is_malformed_floods_no_log(tmp_path: Path) -> None:
    async def flood() -> tuple[int, dict]:
        log = Log()
        control = await serve(tmp_path / "s", log=log)
        for _ in range(100):
            await talk(tmp_path / "s", b"x\n")
        after = await talk(tmp_path / "s", messages.request("status"))
        await control.stop()
        return len(log.named("control.rejected")), after[0]

    lines, after = asyncio.run(flood())
    assert 1 <= lines < 50
    assert after["ok"]


def test_connections_are_bounded(tmp_path: Path) -> None:
    async def flood() -> tuple[list[bytes], list[dict]]:
        control = await serve(tmp_path / "s")
        crowd = [await asyncio.open_unix_connection(str(tmp_path / "s")) for _ in range(40)]
        await asyncio.sleep(0.05)
        turned_away = [await reader.readline() for reader, _ in crowd[32:]]
        for _, writer in crowd:
            writer.close()
        for _ in range(100):  # until it has noticed that they are gone
            await asyncio.sleep(0.05)
            after = await talk(tmp_path / "s", messages.request("status"))
            if after[0]["ok"]:
                break
        await control.stop()
        return turned_away, after

    turned_away, after = asyncio.run(flood())
    assert all(b"too many connections" in line for line in turned_away)
    assert after[0]["ok"]


@pytest.mark.parametrize("uid", [501, 0])
def test_requests_of_a_session_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    """Or a few that take long keep the operator's waiting: reading the rules is one thread's work."""
    monkeypatch.setattr(module, "_peer", lambda _: Peer(1, uid, 1))
    running = most = 0

    async def slow(_request: messages.Request, _peer: Peer) -> dict[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return {}

    async def crowd() -> list[list[dict]]:
        control = await serve(tmp_path / "s", slow)
        try:
            return await asyncio.gather(*(talk(tmp_path / "s", messages.request("health")) for _ in range(8)))
        finally:
            await control.stop()

    assert all(answer["ok"] for (answer,) in asyncio.run(crowd()))
    assert most == (1 if uid else 8), "negative control: root's do not"


def test_a_client_that_never_reads_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would hold a descriptor and a quarter of a megabyte of the warden's for as long as it likes."""
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.5)

    async def large(_request: messages.Request, _peer: Peer) -> dict[str, Any]:
        return {"text": "x" * 60_000}

    async def deaf() -> tuple[int, int]:
        control = await serve(tmp_path / "s", large)
        before, clients = len(os.listdir("/proc/self/fd")), []
        for _ in range(10):
            clients.append(socket.socket(socket.AF_UNIX))
            clients[-1].connect(str(tmp_path / "s"))
            clients[-1].sendall(messages.request("status") * 20)
        most, held, until = 0, 1, time.monotonic() + 20
        while (most < 10 or held) and time.monotonic() < until:
            await asyncio.sleep(0.01)
            held = len(os.listdir("/proc/self/fd")) - before - len(clients)
            most = max(most, held)
        await control.stop()
        return most, held

    held, left = asyncio.run(deaf())
    assert held == 10, "negative control: while there is time to read they are held"
    assert left == 0
