"""Fixtures over the lab, and the rule that a missing capability is tried for, then skipped loudly or failed."""

from __future__ import annotations

import functools
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.support import engine, namespaces
from tests.support import lab as labs
from tests.support.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.box import Box

_REQUIRE = ("all", "kernel", "engine")

# Neither a deadline nor "too slow": both judge the machine.
_PATIENT = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
# In CI the same examples every time: a new counterexample is found by people, not by whoever pushes next.
hypothesis.settings.register_profile("ci", _PATIENT, derandomize=True)
hypothesis.settings.register_profile("local", _PATIENT)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        choices=_REQUIRE,
        default=None,
        help="fail, instead of skip, tests whose requirement (root and kernel, Docker engine) is missing",
    )


@functools.cache
def _missing(mark: str) -> str | None:
    """Why tests with this mark cannot run here, or None."""
    return labs.can_run() if mark == "kernel" else engine.missing()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A temporary folder of our own: the one that sessions share is shut to other users by each that begins.

    (TempPathFactory.getbasetemp.) Many processes under test are other users, and open files there at any time. By its
    name the next lab knows what a session that was killed has left.
    """
    if config.option.basetemp is None:
        config.option.basetemp = str(namespaces.DIRECTORY / namespaces.unique("tests"))
        config.add_cleanup(functools.partial(shutil.rmtree, config.option.basetemp, ignore_errors=True))


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = item.config.getoption("--require")
    for mark in ("kernel", "engine"):
        if item.get_closest_marker(mark) is None:
            continue
        reason = _missing(mark)
        if reason is None:
            continue
        if required in {"all", mark}:
            pytest.fail(f"--require={required}: {mark}: {reason}", pytrace=False)
        pytest.skip(f"{mark}: {reason}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With --require a test that skips itself is a failure too, whatever its reason."""
    outcome = yield
    report = outcome.get_result()
    required = item.config.getoption("--require")
    marks = [mark for mark in ("kernel", "engine") if item.get_closest_marker(mark) and required in {"all", mark}]
    if report.skipped and marks and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"--require={required}: skipped: {report.longrepr}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Nobody shall take a run with skips for a whole one."""
    skipped = len(terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(
            f"NOT TESTED HERE: {skipped} (reasons above; REQUIRE=all makes them failures)", red=True
        )


def _children() -> set[int]:
    """PIDs of this process's children, zombies included."""
    mine = str(os.getpid())
    found = set()
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = path.joinpath("stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[1] == mine:
                found.add(int(path.name))
    return found


@pytest.fixture(autouse=True)
def no_leftovers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a kernel test that leaves a namespace, a mount, a directory or a process behind."""
    if request.node.get_closest_marker("kernel") is None:
        yield
        return
    if "module_lab" in request.fixturenames:  # outlives the test on purpose: have it made before the count
        request.getfixturevalue("module_lab")
    before, things = _children(), set(namespaces.leftovers())
    yield
    until = time.monotonic() + 10.0
    while (left := _children() - before) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left, f"processes left behind: {left}"
    kept = {path for path in namespaces.leftovers() if not any(f"-{one}-" in path for one in ("ca", "copy", "tests"))}
    assert kept <= things, f"left behind: {kept - things}"


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab of its own."""
    with Lab() as fresh:
        yield fresh


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab() as fresh:
        yield fresh


@pytest.fixture
def shared_lab(module_lab: Lab) -> Iterator[Lab]:
    """The module's lab, with servers and logs as new and no box."""
    module_lab.reset()
    yield module_lab
    module_lab.close_boxes()


@pytest.fixture
def box(lab: Lab) -> Callable[..., Box]:
    """`box(policy="site.example\\n")` makes a box in the test's lab and waits until it is ready."""

    def start(**options: object) -> Box:
        fresh = lab.box(**options)
        fresh.start()
        return fresh

    return start
