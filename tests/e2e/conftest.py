"""One engine, one build, one private internet a session; a compose project for whoever asks for one."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Engine, copy_context, missing, proxies, registry_settings
from tests.support.lab import Lab
from tests.support.project import BUNDLE, Project
from tests.support.remote import RESOLVER4

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {  # tag → what is typed before `docker compose build`
    "initd:local": {},
    "initd:none": {"CLAUDE_CODE_VERSION": "none"},
    "initd:node": {"CLAUDE_CODE_VERSION": "none", "EXTRA_PACKAGES": "nodejs"},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


@dataclass(kw_only=True)
class World:
    """The engine, in whose network the lab's internet is the only one, and the folder that was built from."""

    engine: Engine
    lab: Lab
    context: Path
    folder: Path
    bundle: Path

    def project(self, *, name: str, **options: Any) -> Project:
        """A project over the repository's compose.yaml, not up yet."""
        options.setdefault("files", [self.context / "compose.yaml"])
        folder = self.folder / name
        return Project(engine=self.engine, name=name, folder=folder, bundle=self.bundle, **options)


def _build(engine: Engine, context: Path) -> None:
    override = context / "build.json"
    override.write_text('{"services": {"claude": {"build": {"network": "host"}}}}')
    arguments = [word for name, value in proxies().items() for word in ("--build-arg", f"{name}={value}")]
    for tag, variables in VARIANTS.items():
        started = time.monotonic()
        environ = engine.environ() | registry_settings() | {"CLAUDE_IMAGE": tag} | variables
        engine.docker(
            *("compose", "-f", "compose.yaml", "-f", override.name, "build", *arguments), cwd=context, env=environ
        )
        print(f"built {tag} in {time.monotonic() - started:.1f} s")


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="initd-e2e-"))
    folder.chmod(0o755)
    context = folder / "initd"
    copy_context(ROOT, context)
    try:
        with Engine() as engine:
            engine.start()
            engine.sweep()
            engine.prepare()
            _build(engine, context)
            engine.stop()
            with Lab() as lab:
                bundle = folder / "bundle.pem"
                bundle.write_bytes(Path(BUNDLE).read_bytes() + lab.ca_file.read_bytes())
                engine.start("--live-restore", "--dns", RESOLVER4, network=lab.netns)
                yield World(engine=engine, lab=lab, context=context, folder=folder, bundle=bundle)
                engine.sweep()
                engine.stop()  # before its network namespace goes
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_numbers = itertools.count(1)


@pytest.fixture
def make(world: World) -> Iterator[Callable[..., Project]]:
    """`make(policy=…, override=…)`: a project of the test's own, gone afterwards."""
    projects = []

    def make(**options: Any) -> Project:
        projects.append(world.project(name=f"box{next(_numbers)}", **options))
        return projects[-1]

    yield make
    for project in projects:
        project.down()


@pytest.fixture(scope="session")
def shared(world: World) -> Iterator[Project]:
    """A box that is up, for tests that leave it as they found it."""
    project = world.project(name="shared")
    yield project.up()
    project.down()
