from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

from initd.network import neighbourhood

ROUTE4 = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010011AC\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
eth1\t00000A0A\t00000000\t0000\t0\t0\t0\t0000FFFF\t0\t0\t0
"""
ROUTE6 = """\
20010db8000100000000000000000000 40 00000000000000000000000000000000 00 {zero} 00000100 00000001 00000000 00000001 eth0
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 {zero} 00000100 00000001 00000000 00000001 eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 {gw} 00000400 00000001 00000000 00000003 eth0
20010db8000100000000000000000002 80 00000000000000000000000000000000 00 {zero} 00000000 00000002 00000000 80200001 eth0
00000000000000000000000000000001 80 00000000000000000000000000000000 00 {zero} 00000000 00000002 00000000 80200001 lo
""".format(zero="0" * 32, gw="20010db8000100000000000000000001")


FIB = """\
Local:
  +-- 0.0.0.0/0 3 0 5
     +-- 172.17.0.0/16 2 0 2
        |-- 172.17.0.0
           /16 link UNICAST
        |-- 172.17.0.2
           /32 host LOCAL
        |-- 172.17.255.255
           /32 link BROADCAST
"""


def test_connected_networks_and_default_gateways(tmp_path: Path) -> None:
    (tmp_path / "route").write_text(ROUTE4)
    (tmp_path / "ipv6_route").write_text(ROUTE6)
    (tmp_path / "fib_trie").write_text(FIB)
    (tmp_path / "if_inet6").write_text("20010db8000100000000000000000002 02 40 00 80     eth0\n")
    around = neighbourhood(tmp_path)
    assert around.addresses == {ip_address("172.17.0.2"), ip_address("2001:db8:1::2")}
    assert around.subnets == (ip_network("172.17.0.0/16"), ip_network("2001:db8:1::/64"))
    assert around.gateways == (ip_network("172.17.0.1/32"), ip_network("2001:db8:1::1/128"))


def test_a_family_that_is_absent_contributes_nothing(tmp_path: Path) -> None:
    (tmp_path / "route").write_text(ROUTE4.splitlines()[0] + "\n")
    around = neighbourhood(tmp_path)
    assert around.subnets == around.gateways == ()


def test_this_machine_parses() -> None:
    assert ip_address("127.0.0.1") in neighbourhood().addresses
