"""What a session reaches through a real engine's networking: what is listed, by name, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import time

import pytest

OTHER = "203.0.113.20"
AT_ONCE = 50  # milliseconds
CURL = ("curl", "-sS", "--max-time", "8")
SERVER = ["/usr/bin/python3", "-m", "http.server", "-d", "/usr/share/doc/git", "8000"]
HEALTH = {"test": ["CMD", "/usr/bin/curl", "-sS", "-o", "/dev/null", "http://127.0.0.1:8000/"], "interval": "1s"}
CONNECT = """
import socket, sys, time
start = time.monotonic()
try:
    with socket.socket(socket.AF_INET) as sock:
        sock.settimeout(8)
        sock.connect((sys.argv[1], int(sys.argv[2])))
    word = "open"
except OSError as error:
    word = type(error).__name__ if error.errno is None else __import__("errno").errorcode[error.errno]
print(word, round((time.monotonic() - start) * 1000, 1))
"""
ASK = """
import socket, sys
query = b"\\x12\\x34\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + b"\\5other\\7example\\0" + b"\\0\\1\\0\\1"
address, port, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
try:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        sock.connect((address, port))
        sock.send(query if kind == "udp" else len(query).to_bytes(2) + query)
        print("answer", sock.recv(4096).hex())
except TimeoutError:
    print("silence")
except OSError as error:
    print("refused", error.errno)
"""


def connect(project, host, port=443):
    """(errno's name or "open", milliseconds), tried by a session: the fastest of up to five, on a busy machine."""
    tried = []
    while not tried or (min(tried)[0] > AT_ONCE and len(tried) < 5):
        word, spent = project.output("python3", "-c", CONNECT, host, str(port)).split()
        tried.append((float(spent), word))
    return min(tried)[1], min(tried)[0]


def bare(owner, *command, network):
    """Run a command in a container of the same image without initd, on the same network: the negative control."""
    return owner.engine.docker(
        *("run", "--rm", "--network", network, "--entrypoint", command[0], "initd:none", *command[1:]), check=False
    )


def plain_service(**more):
    """A compose service that is no box: Python's web server from the same image."""
    service = {"image": "initd:none", "entrypoint": SERVER, "stop_grace_period": "0s", "healthcheck": HEALTH}
    return service | more


def test_listed_answers(shared):
    assert shared.output(*CURL, "https://site.example/") == "hello from site.example\n"


def test_unlisted_is_refused_at_once(world, shared):
    world.lab.clear()
    done = shared.exec(*CURL, "https://other.example/")
    assert done.returncode == 6, done.stderr  # could not resolve
    for host in (OTHER, "169.254.169.254", "10.9.9.9"):
        word, spent = connect(shared, host)
        assert word in {"ECONNREFUSED", "EHOSTUNREACH"}
        assert spent < AT_ONCE, host
    assert world.lab.packets(to=OTHER) == []
    assert world.lab.dns.queries("other.example") == []


def test_without_initd_it_would_have_been_reached(world, shared):
    """The negative control: the network has a way, the box does not take it."""
    world.lab.clear()
    done = bare(world, "/usr/bin/curl", "-sS", "--max-time", "8", f"http://{OTHER}/", network="shared_default")
    assert done.returncode == 0, done.stderr
    assert world.lab.packets(to=OTHER)


def test_an_unlisted_port_of_a_listed_name(shared):
    assert connect(shared, "site.example", 443)[0] == "open"
    assert connect(shared, "site.example", 8443)[0] == "ECONNREFUSED"


def engine_dns_ports(project):
    """Where Docker's DNAT sends port 53 of 127.0.0.11: {"udp": port, "tcp": port}, read as root on purpose."""
    listed = project.output("rootsh", "-c", "nft list ruleset 2>/dev/null; iptables-legacy-save -t nat 2>/dev/null")
    found = dict(re.findall(r"(udp|tcp).{0,80}?(?:dnat to |--to-destination )127\.0\.0\.11:(\d+)", listed))
    assert set(found) == {"udp", "tcp"}, listed
    return found


@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_docker_dns_is_no_way_around_the_guard(world, shared, kind):
    world.lab.clear()
    ports = engine_dns_ports(shared)
    for port in ("53", ports["udp"], ports["tcp"]):
        said = shared.output("python3", "-c", ASK, "127.0.0.11", port, kind)
        assert said.startswith("refused"), f"{kind} {port}: {said}"
    assert world.lab.dns.queries("other.example") == []


def test_docker_dns_answers_where_no_box_guards_it(make):
    """The negative control of the one before: the same query, the same engine, PID 1 is something else."""
    project = make(override={"services": {"claude": {"entrypoint": ["/bin/sleep", "1000"]}}})
    project.compose("up", "-d")
    said = project.output("/usr/bin/python3", "-c", ASK, "127.0.0.11", "53", "udp")
    assert said.startswith("answer 1234"), said


def test_services_by_name_only_when_listed(make):
    services = {"registry": plain_service(), "secret": plain_service()}
    project = make(policy="registry:8000\n", override={"services": services}).up()
    assert project.exec(*CURL, "http://registry:8000/").returncode == 0
    assert connect(project, "registry", 8001)[0] == "ECONNREFUSED"
    assert project.exec(*CURL, "http://secret:8000/").returncode == 6
    secret = json.loads(project.engine.docker("inspect", project.compose("ps", "-q", "secret").stdout.strip()).stdout)
    address = next(iter(secret[0]["NetworkSettings"]["Networks"].values()))["IPAddress"]
    word, spent = connect(project, address, 8000)
    assert word == "ECONNREFUSED"
    assert spent < AT_ONCE
    reached = bare(project, "/usr/bin/curl", "-sS", f"http://{address}:8000/", network=f"{project.name}_default")
    assert reached.returncode == 0, "the negative control: without a box it answers"


def test_the_host_only_when_listed(world, make):
    project = make(policy="site.example\n").up()
    networks = project.inspect()["NetworkSettings"]["Networks"]
    gateway = next(iter(networks.values()))["Gateway"]
    argv = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", world.lab.netns]
    argv += ["/usr/bin/python3", "-m", "http.server", "80"]
    server = subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        control = ["/usr/bin/curl", "-sS", "-o", "/dev/null", f"http://{gateway}/"]
        while bare(world, *control, network=f"{project.name}_default").returncode:  # the negative control
            assert time.monotonic() < until
        word, spent = connect(project, gateway, 80)
        assert word == "ECONNREFUSED"
        assert spent < AT_ONCE
        project.write_policy("site.example\n@host\n")
        project.output("fwctl", "reload")
        assert connect(project, gateway, 80)[0] == "open"
    finally:
        server.kill()
        server.wait()
