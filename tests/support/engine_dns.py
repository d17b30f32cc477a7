"""What an engine puts into a container's network namespace for its own DNS, and an operator's rules beside it.

Docker's resolver listens on 127.0.0.11 at random ports; rules in `nat` send port 53 there (libnetwork,
resolver_unix.go). It forwards from inside the namespace, as root.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.support.remote import RESOLVER4

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import Lab

ADDRESS, UDP_PORT, TCP_PORT = "127.0.0.11", 44011, 44012

FORWARDER = """
import socket, sys, threading
address, udp_port, tcp_port, upstream = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def answer(query):
    with socket.socket(type=socket.SOCK_DGRAM) as out:
        out.settimeout(3)
        out.connect((upstream, 53))
        out.send(query)
        return out.recv(65535)

def datagram(query, peer):
    if len(query) < 12:
        server.sendto(b"?", peer)
        return
    try:
        server.sendto(answer(query), peer)
    except OSError:
        pass

def stream(listener):
    while True:
        listener.accept()[0].close()

server = socket.socket(type=socket.SOCK_DGRAM)
server.bind((address, udp_port))
threading.Thread(target=stream, args=(socket.create_server((address, tcp_port)),), daemon=True).start()
print("ready", flush=True)
while True:
    threading.Thread(target=datagram, args=server.recvfrom(65535), daemon=True).start()
"""


def put(lab: Lab, tool: str) -> None:
    """Docker's rules in nat and an operator's own in filter, made with `tool`: "legacy" or "nft"."""
    docker = [
        "*nat",
        ":DOCKER_OUTPUT - [0:0]",
        ":DOCKER_POSTROUTING - [0:0]",
        f"-A OUTPUT -d {ADDRESS}/32 -j DOCKER_OUTPUT",
        f"-A POSTROUTING -d {ADDRESS}/32 -j DOCKER_POSTROUTING",
        f"-A DOCKER_OUTPUT -d {ADDRESS}/32 -p tcp -m tcp --dport 53 -j DNAT --to-destination {ADDRESS}:{TCP_PORT}",
        f"-A DOCKER_OUTPUT -d {ADDRESS}/32 -p udp -m udp --dport 53 -j DNAT --to-destination {ADDRESS}:{UDP_PORT}",
        f"-A DOCKER_POSTROUTING -s {ADDRESS}/32 -p tcp -m tcp --sport {TCP_PORT} -j SNAT --to-source :53",
        f"-A DOCKER_POSTROUTING -s {ADDRESS}/32 -p udp -m udp --sport {UDP_PORT} -j SNAT --to-source :53",
        "COMMIT",
    ]
    own = [
        "*filter",
        ":OPERATOR - [0:0]",
        "-A INPUT -p tcp -m tcp --dport 9100 -m comment --comment metrics -j ACCEPT",
        "-A OUTPUT -j OPERATOR",
        "-A OPERATOR -p udp -m udp --dport 123 -j RETURN",
        "-A OPERATOR -p tcp -m tcp --dport 25 -j DROP",
        "COMMIT",
    ]
    for program, lines in (("iptables", docker + own), ("ip6tables", own)):
        argv = ["ip", "netns", "exec", lab.netns, f"{program}-{tool}-restore", "--noflush"]
        done = subprocess.run(argv, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@contextmanager
def running(lab: Lab) -> Iterator[None]:
    """The engine's resolver itself, as root in the box's namespace."""
    argv = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", lab.netns, sys.executable, "-c", FORWARDER]
    argv += [ADDRESS, str(UDP_PORT), str(TCP_PORT), RESOLVER4]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.kill()
