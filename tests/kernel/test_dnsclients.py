"""Real resolvers as clients of the guard: glibc, musl, Go's own, Node's c-ares, each with search and ndots:5."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.support import tools
from tests.support.box import Box
from tests.support.lab import Lab
from tests.support.remote import RESOLVER4
from tests.support.zone import Entry

pytestmark = pytest.mark.kernel

POLICY = "".join(f"{name}.example\n" for name in ("site", "v4", "v6", "chain", "many"))
ZONE = [
    Entry("chain.example", {"CNAME": ("one.cdn.invalid",)}),
    Entry("one.cdn.invalid", {"A": ("203.0.113.91",), "AAAA": ("2001:db8:2::91",)}),
    Entry("many.example", {"A": tuple(f"192.0.2.{n}" for n in range(2, 242, 2))}),
]
EXPECTED = {
    "site.example": {"203.0.113.10", "2001:db8:2::10"},
    "v4.example": {"203.0.113.11"},
    "v6.example": {"2001:db8:2::11"},
    "chain.example": {"203.0.113.91", "2001:db8:2::91"},
    "many.example": {f"192.0.2.{n}" for n in range(2, 242, 2)},
}
ENTIRE = {"getent-edns", "getent-tcp", "go"}
"""Clients that come over TCP for all 120 records; the others speak no EDNS and get as many as fit in 512 bytes."""

MUSL = r"""
#include <stdio.h>
#include <netdb.h>
#include <time.h>
#include <arpa/inet.h>
int main(int n, char **v) {
    struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found, *one;
    struct timespec a, b;
    char text[64];
    clock_gettime(CLOCK_MONOTONIC, &a);
    int error = getaddrinfo(v[1], "443", &hints, &found);
    clock_gettime(CLOCK_MONOTONIC, &b);
    printf("%.6f\n", b.tv_sec - a.tv_sec + (b.tv_nsec - a.tv_nsec) / 1e9);
    if (error) return 2;
    for (one = found; one; one = one->ai_next) {
        void *address = one->ai_family == AF_INET ? (void *)&((struct sockaddr_in *)one->ai_addr)->sin_addr
                                                  : (void *)&((struct sockaddr_in6 *)one->ai_addr)->sin6_addr;
        puts(inet_ntop(one->ai_family, address, text, sizeof text));
    }
    return 0;
}
"""
PYTHON = """
import socket, sys, time
begin = time.monotonic()
try:
    found = {entry[4][0] for entry in socket.getaddrinfo(sys.argv[1], 443, type=socket.SOCK_STREAM)}
    code = 0
except socket.gaierror:
    found, code = set(), 2
print(time.monotonic() - begin, *found, sep="\\n")
sys.exit(code)
"""
GO = """
package main

import ("fmt"; "net"; "os"; "time")

func main() {
    begin := time.Now()
    found, error := net.LookupHost(os.Args[1])
    fmt.Println(time.Since(begin).Seconds())
    for _, one := range found { fmt.Println(one) }
    if error != nil { fmt.Fprintln(os.Stderr, error); os.Exit(2) }
}
"""
NODE = """
const dns = require("dns"), name = process.argv[1], how = process.argv[2];
const begin = process.hrtime.bigint();
const done = found => {
    console.log([Number(process.hrtime.bigint() - begin) / 1e9, ...found].join("\\n"));
    process.exitCode = found.length ? 0 : 2;
};
if (how == "lookup") dns.lookup(name, { all: true }, (error, all) => done(error ? [] : all.map(one => one.address)));
else Promise.allSettled([dns.promises.resolve4(name), dns.promises.resolve6(name)])
    .then(both => done(both.flatMap(one => one.value || [])));
"""


@pytest.fixture(scope="module")
def box(module_lab: Lab) -> Iterator[Box]:
    module_lab.reset()
    module_lab.dns.load(ZONE)
    text = f"nameserver {RESOLVER4}\nsearch corp.example lan.example\noptions ndots:5\n"
    box = module_lab.box(policy=POLICY, resolv_conf=text)
    box.start()
    (box.workspace / "musl.c").write_text(MUSL)
    (box.workspace / "go.go").write_text(GO)
    subprocess.run(["musl-gcc", "-O1", "-static", "-o", "musl", "musl.c"], cwd=box.workspace, check=True)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(box.directory), "GO111MODULE": "off", "CGO_ENABLED": "1"}
    subprocess.run(["go", "build", "-o", "go", "go.go"], cwd=box.workspace, env=environment, check=True)
    yield box
    box.close()


def command(client: str, name: str) -> list[str]:
    return {
        "getent": ["getent", "ahosts", name],
        "getent-edns": ["env", "RES_OPTIONS=edns0", "getent", "ahosts", name],
        "getent-tcp": ["env", "RES_OPTIONS=use-vc", "getent", "ahosts", name],
        "python": ["/usr/bin/python3", "-S", "-c", PYTHON, name],
        "musl": ["/workspace/musl", name],
        "go": ["env", "GODEBUG=netdns=go", "/workspace/go", name],
        "go-libc": ["env", "GODEBUG=netdns=cgo", "/workspace/go", name],
        "node-lookup": [tools.NODE, "-e", NODE, name, "lookup"],
        "node-cares": [tools.NODE, "-e", NODE, name, "resolve"],
    }[client]


def resolved(box: Box, client: str, name: str) -> tuple[int, set[str], float]:
    """Exit code, addresses, and seconds that resolving took (without starting the client, where it can tell)."""
    begin = time.monotonic()
    done = box.exec(command(client, name))
    took = time.monotonic() - begin
    lines = done.stdout.split("\n")
    if client.startswith("getent"):
        return done.returncode, {line.split()[0] for line in lines if line}, took
    assert lines[0], done.stderr
    return done.returncode, {line for line in lines[1:] if line}, float(lines[0])


CLIENTS = ["getent", "getent-edns", "getent-tcp", "python", "musl", "go", "go-libc", "node-lookup", "node-cares"]


@pytest.mark.parametrize("client", CLIENTS)
class TestClient:
    @pytest.mark.parametrize("name", EXPECTED)
    def test_it_resolves_what_is_listed(self, box, client, name):
        code, found, _ = resolved(box, client, name)
        assert code == 0
        if name == "many.example" and client not in ENTIRE:
            assert found < EXPECTED[name]
            assert len(found) >= 20
        else:
            assert found == EXPECTED[name]

    def test_it_fails_at_once_for_what_is_not(self, box, client):
        # getent cannot tell how long it took by itself: starting it in the box is in the figure.
        limit = 0.2 if client.startswith("getent") else 0.02
        took = []
        while not took or (min(took) >= limit and len(took) < 10):  # other processes share these two cores
            code, found, seconds = resolved(box, client, "evil.example")
            assert (code != 0, found) == (True, set())
            took.append(seconds)
        assert min(took) < limit, took

    def test_a_search_domain_makes_no_difference(self, box, client):
        code, found, _ = resolved(box, client, "site")
        assert code != 0
        assert not found


def test_curl_connects_by_name(box: Box):
    done = box.exec(
        ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code} %{time_namelookup}", "https://chain.example/"]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("200")
    refused = box.exec(["curl", "-sS", "https://evil.example/"])
    assert refused.returncode == 6  # could not resolve


def unlisted(lab: Lab) -> set[str]:
    """Names that were asked upstream although POLICY does not list them."""
    asked = {query.name for query in lab.dns.queries()}
    assert asked
    return {name for name in asked if name.endswith(("corp.example", "lan.example", "evil.example"))}


def test_nothing_unlisted_was_asked_by_any_of_them(box: Box, module_lab: Lab):
    assert unlisted(module_lab) == set()


def test_that_would_be_seen(box: Box, module_lab: Lab):
    """Negative control: the same clients, and the names are listed."""
    box.write_policy(f"{POLICY}evil.example\n*.corp.example\n*.lan.example\n")
    assert box.fwctl("reload").returncode == 0
    for client in CLIENTS:
        resolved(box, client, "evil.example")
        resolved(box, client, "site")
    assert {"evil.example", "site.corp.example", "site.lan.example"} <= unlisted(module_lab)
