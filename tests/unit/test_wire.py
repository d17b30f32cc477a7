"""The scanner and builder against dnspython, which shares no code with them."""

from __future__ import annotations

from ipaddress import ip_address

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from initd.core import wire
from initd.core.dnsfilter import name_wire

NAME = name_wire("www.site.example")


def query(name="WWW.site.Example", kind="A", **how):
    return dns.message.make_query(name, kind, **how).to_wire()


def answer_to(asked: bytes, *rrsets: str, rcode=0, flags=0) -> bytes:
    """dnspython's answer to our own query; rrsets as 'owner ttl type data[,data]'."""
    message = dns.message.make_response(dns.message.from_wire(asked))
    message.flags |= flags
    message.set_rcode(rcode)
    for text in rrsets:
        owner, ttl, kind, data = text.split(" ", 3)
        section = message.authority if kind == "SOA" else message.answer
        section.append(dns.rrset.from_text(owner, int(ttl), "IN", kind, *data.split(",")))
    return message.to_wire()


def addresses(answer):
    return [str(ip_address(packed)) for packed in answer.addresses]


SOA = "example. 300 SOA ns.example. root.example. 1 2 3 4 60"
ASKED = wire.build_query(7, NAME, wire.TYPE_A, edns=True)


class TestQuery:
    @pytest.mark.parametrize(
        ("how", "size", "edns"),
        [
            ({}, 512, 0),
            ({"use_edns": 0, "payload": 4096}, 1232, 1),
            ({"use_edns": 0, "payload": 900}, 900, 1),
            ({"use_edns": 0, "payload": 100}, 512, 1),
            ({"want_dnssec": True, "payload": 1232}, 1232, 2),
            ({"use_edns": 0, "payload": 1232, "options": [dns.edns.GenericOption(10, b"12345678")]}, 1232, 1),
        ],
    )
    def test_what_a_client_asks(self, how, size, edns):
        scanned = wire.scan_query(query(kind="AAAA", **how))
        assert scanned[1:3] == (NAME, 28)
        assert scanned.end == 12 + len(NAME) + 4
        assert (scanned.size, scanned.edns) == (size, edns)

    @pytest.mark.parametrize(
        ("data", "rcode"),
        [
            (b"", None),
            (b"\0" * 11, None),
            (b"\0\1\x81\0\0\1" + b"\0" * 6 + NAME + b"\0\1\0\1", None),  # an answer
            (b"\0\1\x28\0\0\1" + b"\0" * 6 + NAME + b"\0\1\0\1", wire.NOTIMP),  # UPDATE
            (b"\0\1\1\0\0\0" + b"\0" * 6, wire.FORMERR),  # no question
            (b"\0\1\1\0\0\2" + b"\0" * 6 + (NAME + b"\0\1\0\1") * 2, wire.FORMERR),
            (b"\0\1\1\0\0\1\0\1" + b"\0" * 4 + NAME + b"\0\1\0\1", wire.FORMERR),  # an answer section
            (b"\0\1\1\0\0\1" + b"\0" * 6 + NAME + b"\0\1\0", wire.FORMERR),  # ends early
            (b"\0\1\1\0\0\1" + b"\0" * 6 + b"\xc0\x0c\0\1\0\1", wire.FORMERR),  # points at itself
            (b"\0\1\1\0\0\1" + b"\0" * 6 + b"\x40" + b"a" * 64 + b"\0\0\1\0\1", wire.FORMERR),  # label of 64
            (b"\0\1\1\0\0\1" + b"\0" * 6 + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1", wire.FORMERR),  # name of 257
            (b"\0\1\1\0\0\1" + b"\0" * 6 + NAME + b"\0\1\0\3", wire.NXDOMAIN),  # CHAOS
            (b"\0\1\1\0\0\1" + b"\0" * 5 + b"\1" + NAME + b"\0\1\0\1" + b"\0\0\x29\4\xd0\0\1\0\0\0\0", wire.BADVERS),
            (
                b"\0\1\1\0\0\1" + b"\0" * 5 + b"\2" + NAME + b"\0\1\0\1" + b"\0\0\x29\4\xd0\0\0\0\0\0\0" * 2,
                wire.FORMERR,
            ),
            (b"\0\1\1\0\0\1" + b"\0" * 5 + b"\1" + NAME + b"\0\1\0\1" + b"\0\0\x29\4\xd0\0\0\0\0\0\5", wire.FORMERR),
        ],
    )
    def test_what_is_no_plain_question(self, data, rcode):
        with pytest.raises(wire.Rejected) as caught:
            wire.scan_query(data)
        assert caught.value.rcode == rcode
        reply = wire.render_rejection(data, caught.value)
        if rcode is None:
            assert reply is None
        else:
            message = dns.message.from_wire(reply)
            assert message.rcode() == rcode
            assert message.id == 1
            assert message.flags & dns.flags.QR

    def test_a_name_of_255_bytes_is_fine(self):
        name = b"".join(bytes((n,)) + b"a" * n for n in (63, 63, 63, 61)) + b"\0"
        assert len(name) == 255
        assert wire.scan_query(b"\0\1\1\0\0\1" + b"\0" * 6 + name + b"\0\1\0\1").name == name

    def test_upper_case_type_bytes_are_not_lowered(self):
        assert wire.scan_query(query(kind="HTTPS")).type == 65  # 0x41 is also "A"

    @settings(max_examples=500)
    @given(st.binary(max_size=300))
    def test_any_bytes_are_scanned_or_rejected(self, data):
        try:
            assert wire.scan_query(data).end <= len(data)
        except wire.Rejected as rejected:
            wire.render_rejection(data, rejected)


class TestAnswer:
    def test_addresses_behind_a_chain_in_any_order(self):
        data = answer_to(
            ASKED,
            "b.cdn.example. 30 A 203.0.113.1,203.0.113.2",
            "www.site.example. 300 CNAME a.cdn.example.",
            "a.cdn.example. 60 CNAME b.cdn.example.",
        )
        answer = wire.scan_answer(data, ASKED)
        assert sorted(addresses(answer)) == ["203.0.113.1", "203.0.113.2"]  # dnspython shuffles
        assert answer.chain == (name_wire("a.cdn.example"), name_wire("b.cdn.example"))
        assert (answer.ttl, answer.stray) == (30, 0)

    @pytest.mark.parametrize(
        "records",
        [
            ("www.site.example. 9 A 203.0.113.1", "evil.example. 9 A 203.0.113.66"),
            ("evil.example. 9 A 203.0.113.66", "www.site.example. 9 A 203.0.113.1"),
            (
                "www.site.example. 9 CNAME a.example.",
                "a.example. 9 A 203.0.113.1",
                "www.site.example. 9 TXT x",
                "b.example. 9 A 203.0.113.66",
            ),
            ("www.site.example. 9 A 203.0.113.1", "site.example. 9 A 203.0.113.66"),
        ],
    )
    def test_a_stray_record_is_not_in_it(self, records):
        answer = wire.scan_answer(answer_to(ASKED, *records), ASKED)
        assert addresses(answer) == ["203.0.113.1"]
        assert answer.stray == 1

    def test_records_of_another_type_or_class_are_not_in_it(self):
        data = answer_to(ASKED, "www.site.example. 9 AAAA 2001:db8::66", "www.site.example. 9 A 203.0.113.1")
        assert addresses(wire.scan_answer(data, ASKED)) == ["203.0.113.1"]

    def test_duplicates_count_once(self):
        record = b"\xc0\x0c\0\1\0\1\0\0\0\x09\0\4\xcb\0\x71\1"
        data = b"\0\7\x81\x80\0\1\0\2\0\0\0\0" + ASKED[12:-11] + record * 2
        assert wire.scan_answer(data, ASKED).addresses == (b"\xcb\0\x71\1",)

    @pytest.mark.parametrize(
        ("ttl", "expected"), [(0, 0), (1, 1), (86401, 86400), (0x7FFFFFFF, 86400), (0x80000000, 0)]
    )
    def test_ttl_is_bounded(self, ttl, expected):
        record = b"\xc0\x0c\0\1\0\1" + ttl.to_bytes(4) + b"\0\4\xcb\0\x71\1"
        data = b"\0\7\x81\x80\0\1\0\1\0\0\0\0" + ASKED[12:-11] + record
        assert wire.scan_answer(data, ASKED).ttl == expected

    @pytest.mark.parametrize(
        ("records", "rcode", "ttl"),
        [((SOA,), 3, 60), ((SOA,), 0, 60), ((), 3, 0), (("www.site.example. 20 CNAME a.example.", SOA), 0, 20)],
    )
    def test_a_negative_answer_lives_as_long_as_its_soa_says(self, records, rcode, ttl):
        answer = wire.scan_answer(answer_to(ASKED, *records, rcode=rcode), ASKED)
        assert (answer.rcode, answer.addresses, answer.ttl) == (rcode, (), ttl)

    @pytest.mark.parametrize(
        "change",
        [
            lambda data: data[:11],
            lambda data: b"\0\x08" + data[2:],  # another id
            lambda data: data[:2] + b"\1\0" + data[4:],  # a query
            lambda data: data[:12] + data[12:].replace(b"\3www", b"\3wWw", 1),  # another case
            lambda data: data[:12] + data[12:].replace(b"\4site", b"\4sitf", 1),  # another name
            lambda data: data[: 12 + len(NAME)] + b"\0\x1c" + data[14 + len(NAME) :],  # another type
            lambda data: data[:4] + b"\0\2" + data[6:],  # two questions
        ],
    )
    def test_what_does_not_answer_our_question_is_waited_past(self, change):
        good = answer_to(ASKED, "www.site.example. 9 A 203.0.113.1")
        assert wire.scan_answer(good, ASKED) is not None
        assert wire.scan_answer(change(good), ASKED) is None

    @pytest.mark.parametrize(
        "tail",
        [
            b"\xc0\x0c\0\1\0\1\0\0\0\x09\0\5\xcb\0\x71\1\1",  # an A of five bytes
            b"\xc0\x0c\0\1\0\1\0\0\0\x09\0\4\xcb\0",  # cut
            b"\xc0\xff\0\1\0\1\0\0\0\x09\0\4\xcb\0\x71\1",  # points forwards
            b"\x80\0\1\0\1\0\0\0\x09\0\4\xcb\0\x71\1",  # label type
            b"\xc0\x0c\0\5\0\1\0\0\0\x09\0\4\1a\0\0",  # a CNAME longer than its name
            b"\xc0\x0c\0\5\0\1\0\0\0\x09\0\2\xc0\x0c",  # a CNAME to itself
        ],
    )
    def test_what_is_broken_is_malformed(self, tail):
        data = b"\0\7\x81\x80\0\1\0\1\0\0\0\0" + ASKED[12:-11] + tail
        with pytest.raises(wire.Malformed):
            wire.scan_answer(data, ASKED)

    def test_a_long_chain_is_malformed(self):
        links = [f"n{i}.example. 9 CNAME n{i + 1}.example." for i in range(40)]
        with pytest.raises(wire.Malformed):
            wire.scan_answer(answer_to(ASKED, "www.site.example. 9 CNAME n0.example.", *links), ASKED)

    @settings(max_examples=500)
    @given(st.binary(max_size=200), st.integers(0, 8), st.integers(0, 3))
    def test_any_bytes_behind_the_question_are_read_or_malformed(self, tail, answers, authorities):
        data = b"\0\7\x81\x80\0\1" + answers.to_bytes(2) + authorities.to_bytes(2) + b"\0\0" + ASKED[12:-11] + tail
        try:
            answer = wire.scan_answer(data, ASKED)
        except wire.Malformed:
            return
        assert all(len(one) == 4 for one in answer.addresses)

    @settings(max_examples=500)
    @given(st.binary(max_size=200))
    def test_any_bytes_are_read_waited_past_or_malformed(self, data):
        try:
            wire.scan_answer(data, ASKED)
        except wire.Malformed:
            return


class TestReply:
    def reply(self, count=3, chain=()):
        packed = tuple(ip_address(f"203.0.113.{n}").packed for n in range(1, count + 1))
        return wire.address_reply(NAME, wire.TYPE_A, tuple(map(name_wire, chain)), packed)

    def ask(self, reply, *, stream=False, ttl=30, **how):
        data = query(**how)
        rendered = wire.render(data, wire.scan_query(data), reply, ttl, stream=stream)
        assert rendered is not None
        return dns.message.from_wire(data), dns.message.from_wire(rendered), len(rendered)

    def test_dnspython_takes_it_as_the_answer(self):
        asked, got, _ = self.ask(self.reply(chain=("a.cdn.example", "b.cdn.example")), use_edns=0)
        assert asked.is_response(got)
        assert got.question[0].name.labels == asked.question[0].name.labels  # the case, too
        assert [str(rrset).split("\n") for rrset in got.answer] == [
            ["WWW.site.Example. 30 IN CNAME a.cdn.example."],
            ["a.cdn.example. 30 IN CNAME b.cdn.example."],
            [f"b.cdn.example. 30 IN A 203.0.113.{n}" for n in (1, 2, 3)],
        ]
        assert got.flags & dns.flags.RA
        assert got.edns == 0

    def test_edns_is_answered_with_edns_only(self):
        assert self.ask(self.reply())[1].edns == -1
        assert self.ask(self.reply(), want_dnssec=True)[1].ednsflags & dns.flags.DO

    def test_too_large_with_edns_is_truncated(self):
        _, got, size = self.ask(self.reply(120), use_edns=0, payload=4096)
        assert got.flags & dns.flags.TC
        assert size <= 1232
        assert got.answer

    def test_too_large_without_edns_is_made_to_fit(self):
        _, got, size = self.ask(self.reply(120))
        assert not got.flags & dns.flags.TC
        assert size <= 512
        assert len(got.answer[0]) > 20

    def test_a_chain_that_leaves_no_room_without_edns_is_left_out(self):
        chain = tuple(f"{'a' * 60}.{'b' * 60}.{n}.example" for n in range(4))
        _, got, size = self.ask(self.reply(3, chain=chain))
        assert size <= 512
        assert str(got.answer[0].name) == "WWW.site.Example."
        assert len(got.answer[0]) == 3

    def test_all_of_it_over_tcp(self):
        _, got, _ = self.ask(self.reply(120), stream=True)
        assert len(got.answer[0]) == 120
        assert not got.flags & dns.flags.TC

    def test_a_refusal_has_an_soa(self):
        asked, got, _ = self.ask(wire.negative_reply(wire.NXDOMAIN), ttl=2)
        assert asked.is_response(got)
        assert got.rcode() == dns.rcode.NXDOMAIN
        assert got.authority[0].rdtype == dns.rdatatype.SOA
        assert got.authority[0].ttl == 2

    def test_the_ttl_is_the_one_asked_for(self):
        reply = self.reply()
        assert [self.ask(reply, ttl=ttl)[1].answer[0].ttl for ttl in (30, 30, 29)] == [30, 30, 29]

    def test_it_is_read_back_as_it_was(self):
        reply = self.reply(3, chain=("a.example",))
        rendered = wire.render(ASKED, wire.scan_query(ASKED), reply, 30)
        answer = wire.scan_answer(rendered, ASKED)
        assert answer.addresses == reply.addresses()
        assert answer.ttl == 30
