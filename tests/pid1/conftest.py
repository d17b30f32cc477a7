from __future__ import annotations

import os
import subprocess

import pytest

pytest.register_assert_rewrite("behaviours", "outer")
from outer import Outer  # noqa: E402  # after the rewrite hook


def _namespaces() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-pfmn", "true"], check=False).returncode == 0


@pytest.fixture(scope="session")
def _kernel(request):
    if not _namespaces():
        pytest.skip("needs root and PID, mount and network namespaces")


@pytest.fixture
def box(_kernel, tmp_path):
    """A factory of inits in namespaces of their own, all of which end with the test."""
    made = []

    def make(**options):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Outer(folder, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
