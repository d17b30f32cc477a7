from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from initd.core import messages


def test_every_operation_round_trips() -> None:
    for op, fields in messages.OPERATIONS.items():
        values = {key: kind() for key, kind in fields.items()}
        assert messages.parse_request(messages.request(op, **values)) == messages.Request(op, values)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b"[" * 60_000, "not JSON"),
        (b'{"op": "open"}', "unknown operation 'open'"),
        (b'{"op": ["status"]}', "unknown operation"),
        (b'{"op": {}}', "unknown operation"),
        (b"{}", "unknown operation None"),
        (b'{"op": "status", "x": 1}', "status takes no fields"),
        (b'{"op": "test"}', "test takes target"),
        (b'{"op": "test", "target": 7}', "target must be a str"),
        (b'{"op": "test", "target": null}', "target must be a str"),
        (b'{"op": "status"' + b" " * messages.MAX_MESSAGE + b"}", "longer than 65536 bytes"),
    ],
)
def test_anything_else_is_an_error_fit_to_be_sent_back(frame: bytes, reason: str) -> None:
    with pytest.raises(messages.ProtocolError, match=".") as caught:
        messages.parse_request(frame)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.binary(max_size=300))
def test_bytes_parse_or_fail_in_one_way(frame: bytes) -> None:
    try:
        request = messages.parse_request(frame)
    except messages.ProtocolError:
        return
    assert request.op in messages.OPERATIONS


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=6), children, max_size=3),
    ),
    st.sampled_from([*messages.OPERATIONS, "nonsense"]),
)
def test_json_parses_or_fails_in_one_way(extra: object, op: str) -> None:
    for value in (extra, {"op": op, "target": extra}, {"op": extra}):
        try:
            messages.parse_request(json.dumps(value).encode())
        except messages.ProtocolError:
            continue


def test_an_answer_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(messages.ProtocolError, match="longer"):
        messages.result({"x": "y" * messages.MAX_MESSAGE})
    assert len(messages.failure("m" * 100_000)) < messages.MAX_MESSAGE
