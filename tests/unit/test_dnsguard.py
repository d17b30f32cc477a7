"""The guard as its clients and upstreams see it: every test talks through real sockets on loopback."""

from __future__ import annotations

import asyncio
import functools
import random
import socket
import time
import tracemalloc
from ipaddress import ip_address

import dns.flags
import dns.message
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from initd.core.leases import Terms
from initd.core.policy import Verdict
from initd.core.ruleset import Endpoint
from initd.dnsguard import GuardOptions, ResolveError
from tests.support.guarded import Guarded, Upstream, framed, question_of, read_message

ZONE = {
    "site.example": ["203.0.113.1", "203.0.113.2", "2001:db8::1"],
    "four.example": ["203.0.113.4"],
    "a.wild.example": ["203.0.113.7"],
    "evil.test": ["203.0.113.66"],
    "big.example": [f"203.0.113.{n}" for n in range(1, 121)],
    "rebind.example": ["203.0.113.9", "10.0.0.1", "127.0.0.1", "169.254.169.254"],
    "inside.example": ["192.168.1.1"],
}
POLICY = """
site.example
four.example
*.wild.example
!bad.wild.example
big.example
rebind.example
inside.example
gone.example
api.deep.example
"""


def scenario(function):
    """Run an async test; a minute is a hang."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(function(*args, **kwargs), 60))

    return run


def guarded(**how):
    return Guarded({name: list(values) for name, values in ZONE.items()}, policy=POLICY, **how)


class TestTable:
    """The table of the design, row by row."""

    @pytest.mark.parametrize(
        ("name", "kind", "rcode", "addresses"),
        [
            ("site.example", "A", "NOERROR", ["203.0.113.1", "203.0.113.2"]),
            ("SITE.Example.", "AAAA", "NOERROR", ["2001:db8::1"]),
            ("four.example", "AAAA", "NOERROR", []),
            ("a.wild.example", "A", "NOERROR", ["203.0.113.7"]),
            ("gone.example", "A", "NXDOMAIN", []),
            ("rebind.example", "A", "NOERROR", ["203.0.113.9"]),
            ("inside.example", "A", "NOERROR", []),
            ("localhost", "A", "NOERROR", ["127.0.0.1"]),
            ("localhost", "AAAA", "NOERROR", ["::1"]),
        ],
    )
    @scenario
    async def test_an_answer(self, name, kind, rcode, addresses):
        async with guarded() as lab:
            got = await lab.ask(name, kind)
            assert (got.rcode, sorted(got.addresses)) == (rcode, addresses)
            learned = {one for one in addresses if ip_address(one) not in (ip_address("127.0.0.1"), ip_address("::1"))}
            assert lab.kernel.addresses() == learned

    @pytest.mark.parametrize("kind", ["A", "AAAA", "TXT", "MX", "ANY", "NULL", "SRV", "PTR", "HTTPS", "TYPE65399"])
    @pytest.mark.parametrize(
        ("name", "rcode"),
        [
            ("evil.test", "NXDOMAIN"),
            ("EVIL.test", "NXDOMAIN"),
            ("payload.site.example.evil.test", "NXDOMAIN"),
            ("www.site.example", "NXDOMAIN"),
            ("bad.wild.example", "NXDOMAIN"),
            ("x.bad.wild.example", "NXDOMAIN"),
            (".".join(["a" * 60] * 4), "NXDOMAIN"),
            ("1.113.0.203.in-addr.arpa", "NXDOMAIN"),
            ("deep.example", "NOERROR"),
            ("example", "NOERROR"),
            (".", "NOERROR"),
        ],
    )
    @scenario
    async def test_the_unlisted_is_answered_here(self, name, kind, rcode):
        async with guarded() as lab:
            got = await lab.ask(name, kind)
            assert (got.rcode, got.addresses) == (rcode, [])
            assert got.message.authority
            assert got.seconds < 0.5
            reader, writer = await lab.stream()
            query = dns.message.make_query(name, kind)
            writer.write(framed(query))
            assert dns.rcode.to_text((await read_message(reader)).rcode()) == rcode
            writer.close()
            assert lab.upstream.asked == []
            assert (await lab.ask("four.example")).addresses  # the negative control: a listed one does go upstream
            assert len(lab.upstream.asked) == 1

    @pytest.mark.parametrize("kind", ["TXT", "HTTPS", "SVCB", "MX", "ANY", "NULL", "CNAME", "NS", "AXFR"])
    @scenario
    async def test_types_that_are_not_carried_are_empty_for_a_listed_name(self, kind):
        async with guarded() as lab:
            got = await lab.ask("site.example", kind)
            assert (got.rcode, got.message.answer, lab.upstream.asked) == ("NOERROR", [], [])

    @scenario
    async def test_what_is_stripped_is_logged_and_counted(self):
        async with guarded() as lab:
            await lab.ask("rebind.example")
            (event,) = lab.log.named("dns.stripped")
            assert event["addresses"] == ["10.0.0.1", "127.0.0.1", "169.254.169.254"]
            assert lab.guard.stats().counts.stripped == 3

    @scenario
    async def test_refused_names_are_told_before_they_are_answered(self):
        async with guarded() as lab:
            lab.guard.on_refused = lambda asked: lab.events.append(("refused", *asked))
            await lab.ask("evil.test", "TXT")
            await lab.ask("site.example")
            (_, name, kind, verdict, peer, stream, allowed), answered = (
                one for one in lab.events if one[-1] == "evil.test" or one[1] == "evil.test"
            )
            assert (name, kind, verdict, stream, allowed) == ("evil.test", "TXT", Verdict.UNLISTED, False, False)
            assert (peer[0], answered[0]) == ("127.0.0.1", "answer")

    @scenario
    async def test_a_listed_range_passes_and_etc_hosts_answers_for_listed_names_only(self):
        hosts = {"four.example": (ip_address("172.18.0.9"),), "evil.test": (ip_address("172.18.0.8"),)}
        own = {"box": (ip_address("172.18.0.2"),)}
        options = {
            "range_listed": lambda address: str(address) == "192.168.1.1",
            "local_names": hosts,
            "own_names": own,
        }
        async with guarded(**options) as lab:
            assert (await lab.ask("inside.example")).addresses == ["192.168.1.1"]
            assert lab.kernel.addresses() == set()
            assert (await lab.ask("four.example")).addresses == ["172.18.0.9"]
            assert lab.kernel.addresses() == {"172.18.0.9"}
            assert (await lab.ask("evil.test")).rcode == "NXDOMAIN"
            assert (await lab.ask("box")).addresses == ["172.18.0.2"]
            assert lab.kernel.addresses() == {"172.18.0.9"}
            assert [name for name, _, _ in lab.upstream.asked] == ["inside.example"]

    @scenario
    async def test_nxdomain_for_one_type_does_not_deny_the_other(self):
        async with guarded() as lab:
            await lab.ask("four.example", "A")
            lab.upstream.handler = lambda data, _: [lab.upstream.answer(data, flags=0x8183)]
            assert (await lab.ask("four.example", "AAAA")).rcode == "NOERROR"
            assert (await lab.ask("gone.example", "AAAA")).rcode == "NXDOMAIN"


class TestBeforeTheAnswer:
    @scenario
    async def test_an_address_is_learned_before_the_answer_leaves(self):
        async with guarded() as lab:
            await lab.ask("four.example")
            assert lab.events[0] == ("learn", "203.0.113.4")
            assert lab.events[-1] == ("answer", "four.example")

    @scenario
    async def test_fifty_clients_of_a_never_seen_name_share_one_question(self):
        async with guarded() as lab:
            lab.upstream.delay = 0.05
            got = await asyncio.gather(*(lab.ask("four.example") for _ in range(50)))
            assert all(one.addresses == ["203.0.113.4"] for one in got)
            assert lab.upstream.asked == [("four.example", "A", "udp")]
            assert all(event[0] == "learn" for event in lab.events[:3])

    @scenario
    async def test_a_client_that_waits_costs_no_more_for_a_long_question(self):
        async with guarded() as lab:
            lab.upstream.handler = lambda *_: []
            padded = dns.message.make_query("a.wild.example", "A", use_edns=0, pad=4000).to_wire(max_size=4096)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.connect(("127.0.0.1", lab.port))
                tracemalloc.start()
                for number in range(500):
                    client.send(number.to_bytes(2) + padded[2:])
                    await asyncio.sleep(0)
                until = time.monotonic() + 20
                while lab.guard.stats().counts.queries < 500:
                    assert time.monotonic() < until
                    await asyncio.sleep(0.01)
                held, _ = tracemalloc.get_traced_memory()
                tracemalloc.stop()
            assert held < 500 * 2000

    @scenario
    async def test_when_the_kernel_refuses_the_answer_is_servfail_and_it_recovers(self):
        async with guarded() as lab:
            lab.kernel.broken = True
            got = await lab.ask("four.example")
            assert (got.rcode, got.addresses) == ("SERVFAIL", [])
            assert lab.guard.stats().insert_failures == 1
            assert lab.log.named("dns.set")
            with pytest.raises(ResolveError) as caught:
                await lab.guard.resolve("site.example")
            assert caught.value.kind == "insert"
            lab.kernel.broken = False
            assert (await lab.ask("four.example")).addresses == ["203.0.113.4"]

    @scenario
    async def test_names_below_a_wildcard_cannot_use_up_the_room_of_listed_names(self, monkeypatch):
        async with guarded() as lab:
            for number in range(40):
                lab.upstream.zone[f"{number}.wild.example"] = [f"192.0.2.{number}"]
            monkeypatch.setattr("initd.core.leases.WILD_MOST", 20 * 4)  # leases of three services each
            answers = [(await lab.ask(f"{number}.wild.example")).rcode for number in range(40)]
            assert answers == ["NOERROR"] * 20 + ["SERVFAIL"] * 20
            assert len(lab.kernel.addresses()) == 20
            assert lab.log.named("dns.set")
            assert (await lab.ask("four.example")).addresses == ["203.0.113.4"]
            assert (await lab.ask("0.wild.example")).addresses == ["192.0.2.0"], "what is held stays"
            saved = {"site.example": {ip_address("203.0.113.1"): 50}, "a.wild.example": {ip_address("203.0.113.7"): 50}}
            assert lab.guard.restore(saved, elapsed=0) == 1

    @scenario
    async def test_what_got_in_before_the_refusal_is_taken_back(self):
        async with guarded() as lab:
            await lab.ask("four.example")
            lab.upstream.zone["site.example"] = ["203.0.113.4", "203.0.113.1", "203.0.113.2"]
            lab.kernel.room = len(lab.kernel.elements) + 2
            assert (await lab.ask("site.example")).rcode == "SERVFAIL"
            assert lab.kernel.addresses() == {"203.0.113.4"}

    @scenario
    async def test_ttl_zero_is_usable_and_not_kept(self):
        async with guarded() as lab:
            lab.upstream.ttl = 0
            assert (await lab.ask("four.example")).addresses == ["203.0.113.4"]
            await lab.ask("four.example")
            assert len(lab.upstream.asked) == 2
            assert set(lab.guard.leases.to_state(time.monotonic())["four.example"].values()) == {90}

    @scenario
    async def test_a_cached_answer_renews_its_lease_before_the_floor_is_undercut(self):
        async with guarded(terms=Terms(floor=2, grace=0.4)) as lab:
            lab.upstream.ttl = 2
            await lab.ask("four.example")
            await asyncio.sleep(0.1)
            await lab.ask("four.example")
            assert lab.kernel.calls == 1  # within the slack: no second insert
            await asyncio.sleep(0.9)
            got = await lab.ask("four.example")
            assert got.message.answer[0].ttl == 1
            assert len(lab.upstream.asked) == 1
            assert min(lab.kernel.elements.values()) >= time.monotonic() + 2.3

    @scenario
    async def test_resolve_goes_the_same_way(self):
        async with guarded() as lab:
            assert set(map(str, await lab.guard.resolve("site.example"))) == set(ZONE["site.example"])
            assert lab.kernel.addresses() == set(ZONE["site.example"])
            for name, kind in (("evil.test", "refused"), ("gone.example", "nxdomain"), ("inside.example", "empty")):
                with pytest.raises(ResolveError) as caught:
                    await lab.guard.resolve(name)
                assert caught.value.kind == kind
            with pytest.raises(ResolveError):
                await lab.guard.resolve("x" * 70)


class TestUpstream:
    @pytest.mark.parametrize("garble", ["id", "name", "cut", "junk", "query", "empty", "case"])
    @scenario
    async def test_a_wrong_answer_is_waited_past(self, garble):
        async with guarded() as lab:

            def handler(data, _transport):
                good = lab.upstream.answer(data)
                wrong = {
                    "id": bytes(byte ^ 255 for byte in good[:2]) + good[2:],
                    "name": good.replace(b"\4", b"\5", 1),
                    "cut": good[:-3],
                    "junk": good[:2] + b"\xff" * 40,
                    "query": data,
                    "empty": b"",
                    "case": good[:12] + data[12:].swapcase()[: len(data) - 12] + good[len(data) :],
                }[garble]
                return [wrong.replace(b"\xcb\0\x71\4", b"\xcb\0\x71\x42"), good]

            lab.upstream.handler = handler
            assert (await lab.ask("four.example")).addresses == ["203.0.113.4"]
            assert lab.kernel.addresses() == {"203.0.113.4"}

    @scenario
    async def test_letter_case_is_random_and_a_server_that_loses_it_is_still_used(self):
        async with guarded() as lab:
            lab.upstream.handler = lambda data, _: [lab.upstream.answer(data[:12] + data[12:].lower())]
            for name in ("site.example", "four.example", "big.example", "rebind.example"):
                assert (await lab.ask(name)).addresses
            assert not lab.guard.stats().upstreams[0].mixed_case
            lab.upstream.handler = None
        async with guarded() as lab:
            lab.upstream.ttl = 0
            for _ in range(8):
                await lab.ask("site.example")
            names = {data[12:26] for data in lab.upstream.raw}
            assert len(names) > 4
            assert {name.lower() for name in names} == {question_of("site.example")[12:26]}
            assert len({data[:2] for data in lab.upstream.raw}) > 4

    @scenario
    async def test_the_clients_message_is_not_passed_on(self):
        async with guarded() as lab:
            option = dns.edns.GenericOption(65001, b"payload payload payload")
            await lab.ask("four.example", use_edns=0, payload=4096, options=[option], want_dnssec=True)
            (sent,) = lab.upstream.raw
            assert b"payload" not in sent
            assert len(sent) == len(question_of("four.example")) + 11

    @scenario
    async def test_truncated_is_asked_again_over_tcp(self):
        async with guarded() as lab:
            lab.upstream.handler = lambda data, transport: (
                [data[:2] + b"\x83\x80" + data[4:12] + data[12:]] if transport == "udp" else None
            )
            reader, writer = await lab.stream()
            writer.write(framed(dns.message.make_query("big.example", "A")))
            assert len((await read_message(reader)).answer[0]) == 120
            writer.close()
            assert [transport for _, _, transport in lab.upstream.asked] == ["udp", "tcp"]
            assert len(lab.kernel.addresses()) == 120

    @scenario
    async def test_an_old_server_without_edns_is_used(self):
        async with guarded() as lab:
            lab.upstream.handler = lambda data, _: (
                [data[:2] + b"\x81\x81" + b"\0" * 8] if data[11] else None  # FORMERR, the question not even echoed
            )
            assert (await lab.ask("four.example")).addresses == ["203.0.113.4"]
            assert not lab.guard.stats().upstreams[0].edns

    @pytest.mark.parametrize("manner", ["no EDNS", "lower case"])
    @scenario
    async def test_what_is_found_out_about_a_server_holds_for_all_questions_on_their_way_to_it(self, manner):
        async with guarded() as lab:
            names = [f"a{number}.wild.example" for number in range(20)]
            lab.upstream.zone = {name: ["203.0.113.7"] for name in names}
            lab.upstream.delay = 0.05
            lab.upstream.handler = {
                "no EDNS": lambda data, _: [data[:2] + b"\x81\x81" + b"\0" * 8] if data[11] else None,
                "lower case": lambda data, _: [lab.upstream.answer(data[:12] + data[12:].lower())],
            }[manner]
            got = await asyncio.gather(*map(lab.ask, names))
            assert [one.addresses for one in got] == [["203.0.113.7"]] * 20
            assert max(one.seconds for one in got) < 0.65  # the share of a server is 0.7 s
            assert lab.guard.stats().upstreams[0].timeouts == 0

    @pytest.mark.parametrize("rcode", [2, 5])
    @scenario
    async def test_the_next_server_is_asked_at_once_when_one_refuses(self, rcode):
        async with guarded(upstreams=2) as lab:
            lab.upstream.handler = lambda data, _: [lab.upstream.answer(data, flags=0x8180 | rcode)]
            lab.upstream.zone = {name: [] for name in ZONE}
            got = await lab.ask("four.example")
            assert got.addresses == ["203.0.113.4"]
            assert got.seconds < 0.6  # the share of one server is 0.7 s
            lab.upstreams[1].handler = lambda data, _: [data[:2] + b"\x81\x82" + data[4:]]
            got = await lab.ask("site.example")
            assert (got.rcode, got.addresses) == ("SERVFAIL", [])
            assert got.seconds < 0.6

    @scenario
    async def test_names_below_a_wildcard_that_nobody_answers_for_keep_no_listed_name_waiting(self):
        async with guarded(concurrency=8, answer_within=1.0) as lab:
            lab.upstream.handler = lambda data, _: [] if b"wild" in data.lower() else None
            slow = [asyncio.create_task(lab.ask(f"{number}.wild.example")) for number in range(200)]
            await asyncio.sleep(0.1)
            quick = await asyncio.gather(*(lab.ask(name) for name in ("four.example", "site.example", "big.example")))
            assert all(one.addresses for one in quick)
            assert max(one.seconds for one in quick) < 0.9  # a seat is held for 1.0 s
            assert {one.rcode for one in await asyncio.gather(*slow)} == {"SERVFAIL"}

    @scenario
    async def test_a_server_that_has_failed_for_long_is_asked_again_when_it_is_back(self):
        async with guarded(answer_within=0.4) as lab:
            lab.upstream.handler = lambda *_: []
            for number in range(10):
                names = [f"{number}-{one}.wild.example" for one in range(120)]
                got = await asyncio.gather(*(lab.ask(name) for name in names))
                assert {one.rcode for one in got} == {"SERVFAIL"}
            assert lab.guard.stats().upstreams[0].timeouts > 1200
            lab.upstream.handler = None
            answers = [await lab.ask("four.example")]
            while not answers[-1].addresses and len(answers) < 5:  # in 0.4 s, in which a busy machine may not run us
                answers.append(await lab.ask("four.example"))
            assert answers[-1].addresses == ["203.0.113.4"]
            assert lab.guard.stats().pending == 0

    @scenario
    async def test_a_silent_server_costs_one_share_and_is_then_asked_last(self):
        async with guarded(upstreams=2) as lab:
            lab.upstream.handler = lambda *_: []
            assert (await lab.ask("four.example")).seconds < 1.3  # two shares are 1.4 s
            await lab.ask("site.example")
            lab.upstream.asked.clear()
            got = await lab.ask("big.example")
            assert got.seconds < 0.6
            assert lab.upstream.asked == []
            assert lab.guard.stats().upstreams[0].ailing
            await asyncio.sleep(1.1)
            lab.upstream.handler = None
            assert (await lab.ask("rebind.example")).seconds < 0.6
            assert lab.upstream.asked  # it is tried again, and good again

    @scenario
    async def test_when_nobody_answers_it_is_servfail_within_three_seconds_and_recovers(self):
        took = []
        while not took or (min(took) >= 3.0 and len(took) < 4):  # 2.8 s: a busy machine may not run us for the rest
            async with guarded() as lab:
                lab.upstream.handler = lambda *_: []
                got = await lab.ask("four.example", within=20)
                assert got.rcode == "SERVFAIL"
                took.append(got.seconds)
                lab.upstream.handler = None
                assert (await lab.ask("four.example")).addresses
        assert 2.0 < min(took) < 3.0

    @scenario
    async def test_an_outage_keeps_what_the_last_answer_held_and_nothing_that_the_name_had_left(self):
        async with guarded(terms=Terms(floor=2, grace=1)) as lab:
            lab.upstream.ttl = 1
            assert (await lab.ask("four.example")).addresses == ["203.0.113.4"]
            lab.upstream.zone = {"four.example": ["203.0.113.5"]}
            await asyncio.sleep(1.1)
            assert (await lab.ask("four.example")).addresses == ["203.0.113.5"]
            assert lab.kernel.addresses() == {"203.0.113.4", "203.0.113.5"}, "both are open for now"
            lab.upstream.handler = lambda data, _: [lab.upstream.answer(data, flags=0x8182)]
            await asyncio.sleep(1.1)
            assert (await lab.ask("four.example")).addresses == ["203.0.113.5"]
            renewed = {str(one.network.network_address): until for one, until in lab.kernel.elements.items()}
            assert renewed["203.0.113.4"] < time.monotonic() + 1
            assert renewed["203.0.113.5"] > time.monotonic() + 20

    @scenario
    async def test_a_server_that_is_not_there_fails_at_once(self):
        async with guarded() as lab:
            lab.guard.set_upstreams([Endpoint(ip_address("127.0.0.1"), 1)])
            got = await lab.ask("four.example")
            assert got.rcode == "SERVFAIL"
            assert got.seconds < 0.6

    @scenario
    async def test_a_server_that_is_not_there_does_not_let_clients_fill_the_log(self):
        async with guarded() as lab:
            lab.guard.set_upstreams([Endpoint(ip_address("127.0.0.1"), 1)])
            for number in range(100):
                assert (await lab.ask(f"n{number}.wild.example")).rcode == "SERVFAIL"
            assert 0 < len(lab.log.named("dns.upstream.unreachable")) < 40

    @scenario
    async def test_a_question_under_way_goes_on_with_the_new_servers(self):
        async with guarded() as lab:
            loopback, other = ip_address("127.0.0.1"), Upstream(lab.upstream.zone)
            lab.upstream.handler = lambda *_: []
            await other.start()
            try:
                asked = asyncio.create_task(lab.ask("four.example"))
                await asyncio.sleep(0.1)
                lab.guard.set_upstreams([Endpoint(loopback, other.port)])
                assert (await asked).addresses == ["203.0.113.4"]
            finally:
                other.stop()

    @scenario
    async def test_a_slow_server_is_still_heard(self):
        async with guarded() as lab:
            lab.upstream.delay = 1.5
            got = await lab.ask("four.example")
            assert got.addresses == ["203.0.113.4"]
            assert 1.4 < got.seconds < 2.8

    @scenario
    async def test_questions_beyond_the_bound_wait_and_are_all_answered(self):
        zone = {f"n{n}.wild.example": ["203.0.113.7"] for n in range(60)}
        async with Guarded(zone, policy=POLICY, concurrency=4, answer_within=20) as lab:
            lab.upstream.delay = 0.02
            got = await asyncio.gather(*(lab.ask(name) for name in zone))
            assert all(one.addresses == ["203.0.113.7"] for one in got)


class TestClients:
    @scenario
    async def test_pipelined_queries_are_answered_out_of_order_on_one_connection(self):
        async with guarded() as lab:
            lab.upstream.delay = 1.0
            reader, writer = await lab.stream()
            queries = [dns.message.make_query(name, "A") for name in ("four.example", "evil.test", "localhost")]
            whole = b"".join(map(framed, queries))
            for position in range(0, len(whole), 7):  # in pieces that respect nothing
                writer.write(whole[position : position + 7])
                await asyncio.sleep(0.001)
            got = [await read_message(reader) for _ in queries]
            assert [one.id for one in got] == [queries[1].id, queries[2].id, queries[0].id]
            writer.write(framed(queries[1]))  # still open
            assert (await read_message(reader)).id == queries[1].id
            writer.close()

    @scenario
    async def test_120_records_for_every_kind_of_client(self):
        async with guarded() as lab:
            plain = await lab.ask("big.example")
            assert len(plain.message.to_wire()) <= 512
            assert len(plain.addresses) >= 20
            assert not plain.message.flags & dns.flags.TC
            edns = await lab.ask("big.example", use_edns=0, payload=4096)
            assert edns.message.flags & dns.flags.TC
            reader, writer = await lab.stream()
            writer.write(framed(dns.message.make_query("big.example", "A")))
            assert len((await read_message(reader)).answer[0]) == 120
            writer.close()

    @pytest.mark.parametrize(
        "data", [b"", b"\0", b"\0" * 11, question_of("four.example").replace(b"\1\0", b"\x81\0", 1)]
    )
    @scenario
    async def test_what_cannot_be_answered_is_dropped(self, data):
        async with guarded() as lab:
            assert await lab.exchange(data, within=0.2) is None
            assert (await lab.ask("four.example")).addresses

    @scenario
    async def test_the_ttl_counts_down(self):
        async with guarded() as lab:
            assert (await lab.ask("four.example")).message.answer[0].ttl == 60
            await asyncio.sleep(1.1)
            assert 50 < (await lab.ask("four.example")).message.answer[0].ttl < 60

    @scenario
    async def test_mutated_queries_neither_break_it_nor_get_upstream(self):
        rng = random.Random(53)
        seeds = [
            question_of(name, kind) for name in ("evil.test", "evil.site.example", "a.b.c") for kind in (1, 16, 65)
        ]
        async with guarded() as lab:

            class Nowhere:
                stream = False

                def send(self, data, peer):
                    pass

            for _ in range(20_000):
                data = bytearray(rng.choice(seeds))
                for _ in range(rng.randrange(4)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
                lab.guard.answer(
                    bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.2 else data), Nowhere(), None
                )
            assert lab.log.named("dns.bug") == []
            assert lab.upstream.asked == []
            assert (await lab.ask("four.example")).addresses


class TestPolicy:
    @scenario
    async def test_a_name_that_is_taken_away_loses_everything_and_others_nothing(self):
        async with guarded() as lab:
            await lab.ask("four.example")
            await lab.ask("site.example")
            lost = lab.decide_by("site.example\n")
            assert {str(one.network.network_address) for one in lost} == {"203.0.113.4"}
            assert lab.kernel.addresses() == {"203.0.113.1", "203.0.113.2"}
            assert (await lab.ask("four.example")).rcode == "NXDOMAIN"
            asked = len(lab.upstream.asked)
            assert (await lab.ask("site.example")).addresses
            assert len(lab.upstream.asked) == asked  # from the cache, although the policy is new

    @scenario
    async def test_a_name_that_is_added_is_not_denied_by_a_cache(self):
        async with guarded() as lab:
            await lab.ask("evil.test")
            lab.decide_by("evil.test\n")
            assert (await lab.ask("evil.test")).addresses == ["203.0.113.66"]

    @scenario
    async def test_ports_that_are_added_or_taken_away_change_at_once(self):
        async with guarded() as lab:
            await lab.ask("four.example")
            lost = lab.decide_by("four.example:443,8443\n")
            assert sorted(one.port for one in lost) == [22, 80]
            assert sorted(one.port for one in lab.kernel.elements) == [443, 8443]

    @scenario
    async def test_an_answer_on_its_way_is_judged_by_the_new_policy(self):
        async with guarded() as lab:
            lab.upstream.delay = 1.0
            waiting = asyncio.create_task(lab.ask("four.example"))
            await asyncio.sleep(0.1)
            lab.decide_by("site.example\n")
            assert (await waiting).rcode == "NXDOMAIN"
            assert lab.kernel.addresses() == set()

    @pytest.mark.parametrize("policy", ["site.example\n", pytest.param(POLICY, id="negative control")])
    @pytest.mark.parametrize("transport", ["udp", "tcp"])
    @scenario
    async def test_a_question_on_its_way_is_not_asked_again_once_its_name_is_gone(self, transport, policy):
        kept = policy == POLICY
        async with guarded(answer_within=2.0, concurrency=1) as lab:
            arrived = asyncio.Event()

            def silent(data, came_by):
                if came_by == transport:
                    arrived.set()
                    return []
                return [lab.upstream.answer(data, flags=0x8380)]

            lab.upstream.handler = silent
            waiting = [asyncio.create_task(lab.ask(name)) for name in ("four.example", "gone.example")]
            await arrived.wait()
            asked = len(lab.upstream.asked)
            lab.decide_by(policy)
            got = await asyncio.gather(*waiting)
            assert {one.rcode for one in got} == {"SERVFAIL" if kept else "NXDOMAIN"}
            assert (max(one.seconds for one in got) > 1) == kept
            await asyncio.sleep(1)
            assert (len(lab.upstream.asked) > asked) == kept
            assert lab.guard.stats().pending == 0

    @scenario
    async def test_a_range_that_is_no_longer_listed_no_longer_passes(self):
        async with guarded(range_listed=lambda _: True) as lab:
            assert (await lab.ask("inside.example")).addresses == ["192.168.1.1"]
            lab.decide_by(POLICY, options=GuardOptions())
            assert (await lab.ask("inside.example")).addresses == []


class TestTime:
    @scenario
    async def test_listed_literal_names_are_refreshed_and_those_of_wildcards_are_not(self):
        async with guarded(terms=Terms(floor=1, grace=0.5)) as lab:
            lab.upstream.ttl = 1
            await lab.guard.resolve("four.example")
            await lab.ask("a.wild.example")
            begin = time.monotonic()
            while (now := time.monotonic()) < begin + 4:
                elements = {one: until for one, until in lab.kernel.elements.items() if one.port == 443}
                (until,) = (u for e, u in elements.items() if str(e.network.network_address) == "203.0.113.4")
                assert until > now  # without a gap
                await asyncio.sleep(0.02)
                if time.monotonic() > now + 0.2:  # we were not run, and the guard shares our loop
                    await asyncio.sleep(0.1)
            asked = [name for name, kind, _ in lab.upstream.asked if kind == "A"]
            assert 3 <= asked.count("four.example") <= 10  # 4 s, never twice within half a floor
            assert asked.count("a.wild.example") == 1

    @scenario
    async def test_what_is_refreshed_while_its_ttl_lasts_is_not_looked_at_all_the_time(self, monkeypatch):
        monkeypatch.setattr("initd.dnsrefresh.random.uniform", lambda low, _: low)
        async with guarded(terms=Terms(floor=0.2, grace=0.2)) as lab:
            lab.upstream.ttl = 3
            await lab.guard.resolve("four.example")
            await asyncio.sleep(2.4)
            assert 1 <= lab.guard.stats().counts.from_cache <= 5
            assert [kind for _, kind, _ in lab.upstream.asked] == ["A", "AAAA"], (
                "nothing depends on a family without leases"
            )
            assert all(until > time.monotonic() for until in lab.kernel.elements.values())

    @scenario
    async def test_a_name_that_goes_on_failing_is_tried_later_and_later(self, monkeypatch):
        monkeypatch.setattr("initd.dnsrefresh.random.uniform", lambda low, _: low)
        async with guarded(terms=Terms(floor=0.4, grace=0.2)) as lab:
            lab.upstream.handler = lambda data, _: [data[:2] + b"\x81\x82" + data[4:]]
            with pytest.raises(ResolveError):
                await lab.guard.resolve("four.example")
            await asyncio.sleep(4.0)  # after 1, 2 and 4 s; each pause begins with the answer before
            assert [kind for _, kind, _ in lab.upstream.asked].count("A") == 3

    @scenario
    async def test_listed_names_in_etc_hosts_are_kept_learned_although_nobody_asks(self):
        hosts = {
            "four.example": (ip_address("172.18.0.9"),),
            "db.wild.example": (ip_address("172.18.0.8"), ip_address("fd00::8")),
            "evil.test": (ip_address("172.18.0.7"),),
            "no name": (ip_address("172.18.0.6"),),
        }
        async with guarded(terms=Terms(floor=1, grace=0.5), local_names=hosts) as lab:
            await lab.holds({"172.18.0.9", "172.18.0.8", "fd00::8"})
            lab.decide_by("db.wild.example\nevil.test\n")
            await lab.holds({"172.18.0.7", "172.18.0.8", "fd00::8"})
            assert lab.upstream.asked == []

    @scenario
    async def test_a_name_that_does_not_resolve_is_tried_again_and_found(self):
        async with guarded(terms=Terms(floor=0.4, grace=0.2)) as lab:
            lab.upstream.handler = lambda data, _: [data[:2] + b"\x81\x82" + data[4:]]
            with pytest.raises(ResolveError):
                await lab.guard.resolve("four.example")
            lab.upstream.handler = None
            await lab.holds({"203.0.113.4"})

    @scenario
    async def test_an_open_connection_keeps_its_address(self):
        async with guarded(terms=Terms(floor=0.6, grace=0.6, sweep=0.6)) as lab:
            lab.upstream.ttl = 0
            await lab.ask("a.wild.example")
            address = ip_address("203.0.113.7")
            for _ in range(5):
                await asyncio.sleep(0.45)
                lab.guard.sweep({address})
            assert lab.held("a.wild.example") == {"203.0.113.7"}
            assert all(until > time.monotonic() for until in lab.kernel.elements.values())
            await asyncio.sleep(1.5)
            lab.guard.sweep(set())
            assert lab.held("a.wild.example") == set()
            assert lab.kernel.addresses() == set()

    @scenario
    async def test_saved_leases_are_taken_up_as_far_as_the_policy_allows(self):
        one, two, three = (ip_address(text) for text in ("203.0.113.1", "203.0.113.2", "10.0.0.1"))
        async with guarded() as lab:
            saved = {"four.example": {one: 50, two: 5, three: 50}, "evil.test": {two: 50}, "x" * 80: {two: 50}}
            assert lab.guard.restore(saved, elapsed=10) == 1
            assert lab.held("four.example") == {"203.0.113.1"}
            assert max(lab.kernel.elements.values()) < time.monotonic() + 41
            assert lab.guard.restore(saved, elapsed=1000, least=60) == 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=80), min_size=1, max_size=30))
def test_whatever_the_upstream_sends_nothing_is_learned_but_the_answer(tails):
    async def run():
        async with guarded(answer_within=0.4) as lab:
            packets = iter(tails)

            def handler(data, _):
                tail = next(packets, b"")
                return [tail, data[:2] + b"\x81\x80\0\1\0\2\0\1\0\0" + data[12 : len(data) - 11] + tail]

            lab.upstream.handler = handler
            await lab.ask("four.example")
            assert lab.log.named("dns.bug") == []
            assert lab.kernel.addresses() == set()
            lab.upstream.handler = None
            answers = [await lab.ask("site.example")]
            while not answers[-1].addresses and len(answers) < 5:  # in 0.4 s, in which a busy machine may not run us
                answers.append(await lab.ask("site.example"))
            assert answers[-1].addresses

    asyncio.run(run())


class TestAudit:
    @scenario
    async def test_the_unlisted_is_asked_upstream_and_opens_nothing(self):
        async with guarded(audit=True) as lab:
            lab.guard.on_refused = lambda asked: lab.events.append(("audit", asked.name, asked.allowed))
            got = await lab.ask("evil.test")
            assert (got.rcode, got.addresses) == ("NOERROR", ["203.0.113.66"])
            assert lab.events[0] == ("audit", "evil.test", True)
            assert not [event for event in lab.events if event[0] == "learn"]
            (lease,) = lab.guard.leases.of(ip_address("203.0.113.66"))
            assert (lease.name, lease.services) == ("evil.test", frozenset())
            lab.guard.set_policy(lab.guard._decide, options=GuardOptions())
            assert (await lab.ask("evil.test")).rcode == "NXDOMAIN", "nothing of it is left in the cache"
