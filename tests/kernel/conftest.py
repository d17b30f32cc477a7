"""Both backends, one body: `backend` makes a fresh backend inside the box."""

from __future__ import annotations

import importlib
import os

import pytest

from tests.kernel.wire import Wire

# Imported before any fork: 150 ms that each child would pay again.
pyroute2 = pytest.importorskip("pyroute2")

CLASSES = {"xtables": "Xtables", "nftables": "Nftables"}


class Maker:
    """Calling it makes the backend; `name` is for what differs in how a test meddles."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self):
        return getattr(importlib.import_module(f"initd.kernel.{self.name}"), CLASSES[self.name])()


@pytest.fixture(params=sorted(CLASSES, reverse=True))
def backend(request: pytest.FixtureRequest) -> Maker:
    try:
        importlib.import_module(f"initd.kernel.{request.param}")
    except ModuleNotFoundError as error:
        pytest.skip(f"NOT TESTED: there is no {request.param} backend here ({error})")
    return Maker(request.param)


@pytest.fixture
def make_wire():
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: network namespaces need root")
    made: list[Wire] = []

    def make(family: str = "dual") -> Wire:
        made.append(Wire(family))
        return made[-1]

    yield make
    for wire in made:
        wire.close()


@pytest.fixture
def wire(make_wire) -> Wire:
    return make_wire()
