"""Packets over a real socket pair: whole, bounded, never blocking."""

from __future__ import annotations

import os
import socket

import pytest

from initd.channel import MAX_PACKET, Channel


@pytest.fixture
def ends():
    ours, theirs = Channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_keep_their_borders(ends):
    ours, theirs = ends
    other = Channel(theirs)
    assert ours.send(event="one")
    assert ours.send(event="two", grace=1.5)
    assert other.receive() == [{"event": "one"}, {"event": "two", "grace": 1.5}]
    assert other.receive() == []
    assert other.open


@pytest.mark.parametrize("junk", [b"{", b"[]", b"3", b'"event"', b"{}", b'{"event": 3}', b"\xff\xfe", b"[" * 100_000])
def test_junk_is_dropped_and_what_follows_is_read(ends, junk):
    ours, theirs = ends
    theirs.send(junk)
    theirs.send(b'{"event": "after"}')
    assert ours.receive() == [{"event": "after"}]


def test_a_full_or_closed_channel_refuses_instead_of_blocking(ends):
    ours, theirs = ends
    sent = 0
    while ours.send(event="x" * 1000):
        sent += 1
        assert sent < 10_000
    theirs.close()
    assert not ours.send(event="x")
    assert ours.receive() == []
    assert not ours.open


def test_a_packet_that_is_too_large_is_refused(ends):
    assert not ends[0].send(event="x" * MAX_PACKET)


def test_an_inherited_end_is_not_passed_on():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    channel = Channel.inherited(theirs.detach())
    assert not os.get_inheritable(channel.fileno())
    channel.close()
    ours.close()
