from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.pid1.behaviours", "tests.pid1.outer")
from tests.pid1.outer import Outer  # noqa: E402  # after the rewrite hook


@pytest.fixture
def box(tmp_path):
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
