"""Every row of docs/init.md, for initd as PID 1 and below another init."""

from __future__ import annotations

from functools import partial

import pytest

from tests.pid1.behaviours import BEHAVIOURS

pytestmark = pytest.mark.kernel
BELOW = ["sh", "-c", 'trap "kill -TERM \\$child" TERM; "$@" & child=$!; wait $child; wait $child', "sh"]


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda function: function.__name__)
def test_pid_1(behaviour, box):
    behaviour(partial(box, init="initd"))
