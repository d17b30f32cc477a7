"""initd as PID 2 or later, under another init: same service, and nothing of its neighbours' touched."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial

import pytest

from tests.pid1 import behaviours
from tests.pid1.outer import children, eventually

pytestmark = pytest.mark.kernel
INIT = ["tini", "--"]
SAME = [
    behaviours.exit_codes,
    behaviours.killed_by_signal,
    behaviours.not_found,
    behaviours.signals_forwarded,
    behaviours.realtime_not_coalesced,
    behaviours.stop_signals_do_not_freeze,
    behaviours.clean_signal_state,
    behaviours.orphan_storm,
    behaviours.daemons_get_grace,
    behaviours.second_term,
]


@pytest.mark.parametrize("behaviour", SAME, ids=lambda function: function.__name__)
def test_below_another_init(behaviour, box):
    behaviour(partial(box, init="initd", below=INIT))


def test_ends_its_descendants_and_nobody_else(box):
    """A neighbour of the same user in the same PID namespace survives our stop; our orphaned daemon does not."""
    below = ["sh", "-c", 'sleep 300 & echo; "$@"; echo $? > $OUT/code; wait', "sh"]
    one = box(below=below)
    daemon = f"{sys.executable} -IS -c 'import os,time; os.setsid(); time.sleep(200)' & sleep 100"
    one.start("sh", "-c", daemon)
    neighbour, init = children(one.pid)
    assert one.comm(init) == "initd"
    assert eventually(lambda: sum(one.comm(pid) == "python" or "python" in one.comm(pid) for pid in one.inside()) >= 2)
    os.kill(init, signal.SIGTERM)
    assert eventually((one.folder / "code").exists)
    assert eventually((one.folder / "code").read_text) == "143\n"
    assert sorted(one.inside()) == sorted([one.pid, neighbour])  # zombies left out: they have no namespace link
