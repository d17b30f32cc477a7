"""libnftables' JSON listing as text that compares: no handles, no counts, one spelling over its versions. Pure.

Whatever this vocabulary does not know is rendered as its JSON, so that a foreign rule in our table always differs.
Schema: libnftables-json(5).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Node = Any
"""A piece of the listing; its shape is what this module finds out."""


def _atom(node: Node) -> str:
    if isinstance(node, dict):
        if "prefix" in node:
            return f"{node['prefix']['addr']}/{node['prefix']['len']}"
        if "range" in node:
            return "-".join(map(_atom, node["range"]))
        if "set" in node:
            members = node["set"] if isinstance(node["set"], list) else [node["set"]]
            return "{ " + ", ".join(sorted(map(_atom, members), key=_order)) + " }"
        return json.dumps(node, sort_keys=True)
    return str(node)


def _order(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdecimal() else (-1, text)


def _left(node: Node) -> str:
    if isinstance(node, dict) and len(node) == 1:
        ((kind, body),) = node.items()
        if kind == "concat":
            return " . ".join(map(_left, body))
        if kind == "payload" and set(body) == {"protocol", "field"}:
            return f"{body['protocol']} {body['field']}"
        if kind == "meta":
            key = str(body["key"])
            return key if key in {"iifname", "oifname"} else f"meta {key}"
        if kind == "ct" and set(body) == {"key"}:
            return f"ct {body['key']}"
        if kind == "fib" and set(body) == {"result", "flags"}:
            flags = body["flags"] if isinstance(body["flags"], list) else [body["flags"]]
            return f"fib {' . '.join(flags)} {body['result']}"
    return json.dumps(node, sort_keys=True)


def _match(body: Node) -> str:
    left, right = _left(body["left"]), _atom(body["right"])
    if left in {"iifname", "oifname"}:
        right = f'"{right}"'
    operator = {"==": "", "in": ""}.get(body["op"], f"{body['op']} ")
    return f"{left} {operator}{right}"


def _reject(body: Node) -> str:
    if not body or "type" not in body:
        return "reject"
    return f"reject with {body['type']}" + (f" {body['expr']}" if "expr" in body else "")


def _limit(body: Node) -> str:
    if set(body) != {"rate", "burst", "per"}:
        return json.dumps({"limit": body}, sort_keys=True)
    return f"limit rate {body['rate']}/{body['per']} burst {body['burst']} packets"


def _log(body: Node) -> str:
    if not body or set(body) != {"prefix", "group"}:
        return json.dumps({"log": body}, sort_keys=True)
    return f'log prefix "{body["prefix"]}" group {body["group"]}'


_STATEMENTS: dict[str, Callable[[Node], str]] = {
    "match": _match,
    "reject": _reject,
    "limit": _limit,
    "log": _log,
    "goto": lambda body: f"goto {body['target']}",
    "accept": lambda _: "accept",
    "drop": lambda _: "drop",
}


def _statement(node: Node) -> str:
    ((kind, body),) = node.items()
    if kind == "counter" and isinstance(body, str):
        return f'counter name "{body}"'
    return _STATEMENTS[kind](body) if kind in _STATEMENTS else json.dumps(node, sort_keys=True)


def rule(expressions: Node) -> str:
    """One rule's expressions as a line."""
    return " ".join(map(_statement, expressions))


def chain(node: Node) -> str:
    """A chain's declaration; empty for one without a hook."""
    if "hook" not in node:
        return ""
    kind = f"type {node['type']} hook {node['hook']}" + (f" device {node['dev']}" if "dev" in node else "")
    return f"{kind} priority {node['prio']}; policy {node.get('policy', 'accept')};"


def definition(node: Node) -> str:
    """A set's definition."""
    key = node["type"] if isinstance(node["type"], list) else [node["type"]]
    flags = node.get("flags", [])
    parts = [f"type {' . '.join(key)};"]
    parts += [f"size {node['size']};"] if "size" in node else []
    parts += [f"flags {','.join(flags if isinstance(flags, list) else [flags])};"]
    known = {"family", "name", "table", "type", "handle", "flags", "size", "elem"}
    parts += [f"{key} {json.dumps(node[key])};" for key in sorted(set(node) - known)]
    return " ".join(parts)
