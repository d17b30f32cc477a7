"""What is not listed is refused within milliseconds, whatever the protocol; without the rules it answers."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import pytest

from tests.support import engine_dns, holding
from tests.support.attempts import Attempt, attempt_all
from tests.support.box import WARDEN_UID
from tests.support.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.attempts import Target
    from tests.support.box import Box

pytestmark = pytest.mark.kernel

ROUNDS = 15
LIMIT = 5.0  # ms
ENGINE: tuple[Target, ...] = (
    ("tcp", engine_dns.ADDRESS, 53),
    ("udp", engine_dns.ADDRESS, 53),
    ("tcp", engine_dns.ADDRESS, engine_dns.TCP_PORT),
    ("udp", engine_dns.ADDRESS, engine_dns.UDP_PORT),
)
GROUPS: dict[str, tuple[Target, ...]] = {
    "unlisted address": holding.UNLISTED,
    "unlisted port of a listed address": holding.OTHER_PORT,
    "ping": holding.ICMP,
    "special ranges": holding.SPECIAL,
    "upstream resolvers": holding.RESOLVERS,
    "the engine's own resolver": ENGINE,
}
ALL = tuple(target for group in GROUPS.values() for target in group)


@dataclass(frozen=True)
class Scene:
    backend: str
    lab: Lab
    box: Box
    before: list[Attempt]  # of ALL, when there was no box yet


@pytest.fixture(scope="module", params=[("xtables", "legacy"), ("nftables", "nft")], ids=lambda param: param[0])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    backend, tool = request.param
    with Lab() as lab, engine_dns.running(lab):
        engine_dns.put(lab, tool)
        holding.let_ping(lab)
        before = holding.without_box(lab, ALL)
        lab.clear()
        box = lab.box(
            policy=holding.POLICY,
            resolv_conf=f"nameserver {engine_dns.ADDRESS}\n",
            env={"INITD_BACKEND": backend},
        )
        box.start()
        yield Scene(backend, lab, box, before)


def test_everything_answers_without_a_box(scene: Scene) -> None:
    assert holding.answering(ALL, scene.before) == set(ALL), scene.before


@pytest.mark.parametrize("group", GROUPS)
def test_refused_in_milliseconds(scene: Scene, group: str) -> None:
    targets = GROUPS[group]
    tried = attempt_all(scene.box, targets * ROUNDS)
    assert holding.unrefused(targets * ROUNDS, tried) == {}
    for number, target in enumerate(targets):
        times = [outcome.ms for outcome in tried[number :: len(targets)]]
        assert median(times) < LIMIT, (target, times)


def test_tcp_is_reset_so_that_clients_do_not_wait(scene: Scene) -> None:
    tcp = [target for target in ALL if target[0] == "tcp"]
    assert {outcome.error for outcome in attempt_all(scene.box, tcp)} == {"ECONNREFUSED"}


def test_the_engines_resolver_answers_the_warden_alone(scene: Scene) -> None:
    """The warden's own questions go through it: without them nothing would resolve here."""
    warden = attempt_all(scene.box, ENGINE, user=(WARDEN_UID, WARDEN_UID))
    assert holding.answering(ENGINE, warden) == set(ENGINE), warden
    for uid in (0, 501, 1000, WARDEN_UID + 1):
        tried = attempt_all(scene.box, ENGINE, user=(uid, WARDEN_UID))
        assert holding.unrefused(ENGINE, tried) == {}, uid
    assert scene.lab.dns.queries("site.example"), "the box asks through the engine's resolver"


def test_what_is_listed_answers(scene: Scene) -> None:
    holding.assert_holds(scene.lab, scene.box)


def test_nothing_unlisted_has_left_in_all_this(scene: Scene) -> None:
    assert len(scene.lab.packets(to=sorted(holding.REACHABLE))) > 10
    assert holding.strange_packets(scene.lab) == set()
    assert holding.strange_names(scene.lab) == set()


def test_without_the_rules_the_same_probes_answer(scene: Scene) -> None:
    """Last: it leaves the box open. The negative control of everything above, with the box still running."""
    holding.flush(scene.lab, scene.backend)
    tried = attempt_all(scene.box, ALL)
    assert holding.answering(ALL, tried) == set(ALL), tried
    assert scene.box.fwctl("health").returncode == 1, "and the box knows"
