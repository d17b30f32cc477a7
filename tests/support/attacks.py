"""What a hostile program in a session tries, each once; prints a JSON object: attack → what it gained, or null.

Runs: anybody, in a box, as `python -I -c SOURCE`; standard library only. As root in the box (what `rootsh` gives) the
attacks of CONTROLS succeed, which shows that they are no empty words.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys

CONTROLS = (
    "nft list ruleset", "ipset list", "conntrack -L", "raw socket", "packet socket", "SO_MARK",
    "bind port 53", "become the warden", "signal the warden", "signal PID 1", "write the run dir", "trace the warden",
)  # fmt: skip

COMMANDS = """
iptables-legacy -S
iptables-legacy -F
iptables-legacy -P OUTPUT ACCEPT
iptables-legacy -I OUTPUT -j ACCEPT
ip6tables-legacy -F
iptables-nft -F
iptables-nft -I OUTPUT -j ACCEPT
nft list ruleset
nft flush ruleset
nft delete table inet initd
ipset list
ipset flush
ipset add initd4-learned 203.0.113.20,tcp:443
conntrack -L
conntrack -F
ip link set lo down
ip addr add 203.0.113.20/32 dev lo
ip route add blackhole 203.0.113.10
ip link add dummy0 type dummy
sysctl -w net.ipv4.ip_forward=1
mount -o remount,rw /workspace/.aidevcontainer
umount /workspace/.aidevcontainer
unshare -n true
unshare -m true
unshare -Ur iptables-legacy -F
unshare -Ur nft flush ruleset
unshare -Ur ipset flush
unshare -Urm umount /workspace/.aidevcontainer
unshare -Ur nsenter -t 1 -n true
unshare -Urn nsenter -t 1 -n true
unshare -Urn curl -sm 2 http://203.0.113.20/
nsenter -t 1 -m true
setpriv --reuid 990 true
setpriv --reuid 0 true
su -c true
curl -sm 2 --interface 127.0.0.1 http://203.0.113.20/
curl -sm 2 --local-port 53 http://203.0.113.20/
curl -sm 2 --resolve site.example:443:203.0.113.20 -k https://site.example/
curl -sm 2 --proxy http://203.0.113.20:80 http://site.example/
curl -sm 2 --dns-servers 203.0.113.53 http://site.example/
""".strip().splitlines()

PTRACE_SEIZE, PTRACE_ATTACH = 0x4206, 16
SO_MARK, SO_RCVBUFFORCE, IP_TRANSPARENT = 36, 33, 19
libc = ctypes.CDLL(None, use_errno=True)


def ours() -> dict[str, int]:
    """Our processes by name."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm") as file:
                found.setdefault(file.read().strip(), int(pid))
        except OSError:
            continue
    return {"PID 1": 1, "the keeper": found["initd-keeper"], "the warden": found["initd-warden"]}


def call(number, *arguments):
    """A libc function that says -1 for failure; true if it worked."""
    if number(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return True


def write(path, text="x"):
    with open(path, "w") as file:
        file.write(text)
    return True


def option(level, name, value=1):
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.setsockopt(level, name, value)
    return True


def bind(address, port, kind=socket.SOCK_DGRAM):
    with socket.socket(type=kind) as sock:
        sock.bind((address, port))
    return True


def open_socket(*how):
    socket.socket(*how).close()
    return True


def reading(path):
    with open(path, "rb") as file:
        return bool(file.read(1))


def limits(pid):
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0))
    return True


def trace(pid):
    return call(libc.ptrace, PTRACE_SEIZE, pid, None, None)


def against(name, pid):
    """Attacks on one of our processes. PID 1 has our UID as its effective one: its priority may be lowered."""
    yield f"trace {name}", lambda: trace(pid)
    yield f"limits of {name}", lambda: limits(pid)
    for what in ("environ", "mem", "maps", "auxv", "stack"):
        yield f"read {what} of {name}", lambda what=what: reading(f"/proc/{pid}/{what}")
    for what in ("fd", "task", "map_files", "fdinfo"):
        if what != "task":
            yield f"list {what} of {name}", lambda what=what: os.listdir(f"/proc/{pid}/{what}")
    for what in ("root", "cwd", "exe", "ns/net", "ns/mnt"):
        yield f"follow {what} of {name}", lambda what=what: os.readlink(f"/proc/{pid}/{what}")
    for what in ("oom_score_adj", "coredump_filter", "clear_refs", "comm", "mem"):
        yield f"write {what} of {name}", lambda what=what: write(f"/proc/{pid}/{what}", "1")
    yield f"take a descriptor of {name}", lambda: call(libc.syscall, 438, os.pidfd_open(pid), 0, 0)  # pidfd_getfd
    yield f"signal {name}", lambda: os.kill(pid, 0) is None
    yield f"kill {name}", lambda: os.kill(pid, signal.SIGKILL) is None
    if pid != 1:
        yield f"priority of {name}", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19) is None
        yield f"processors of {name}", lambda: os.sched_setaffinity(pid, {0}) is None


def attacks():
    for line in COMMANDS:
        yield line, lambda line=line: subprocess.run(line.split(), capture_output=True, check=False).returncode == 0
    yield "raw socket", lambda: open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    yield "raw IPv6 socket", lambda: open_socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    yield "packet socket", lambda: open_socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    yield "datagram packet socket", lambda: open_socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    yield "SO_MARK", lambda: option(socket.SOL_SOCKET, SO_MARK)
    yield "SO_RCVBUFFORCE", lambda: option(socket.SOL_SOCKET, SO_RCVBUFFORCE)
    yield "IP_TRANSPARENT", lambda: option(socket.IPPROTO_IP, IP_TRANSPARENT)
    yield "bind port 53", lambda: bind("127.0.0.2", 53)
    yield "bind the guard's port", lambda: bind("127.0.0.1", 53)
    yield "bind the guard's TCP port", lambda: bind("0.0.0.0", 53, socket.SOCK_STREAM)
    yield "become the warden", lambda: os.setuid(990) is None
    yield "become root", lambda: os.setuid(0) is None
    yield "take the warden's group", lambda: os.setgroups([990]) is None
    for path in ("/run/initd/x", "/run/initd/ready", "/run/initd/state.toml", "/var/lib/initd/x", "/etc/resolv.conf",
                 "/etc/hosts", "/etc/passwd", "/proc/sys/net/ipv4/ip_forward", "/workspace/.aidevcontainer/x",
                 "/workspace/.aidevcontainer/allowed-domains.txt", "/dev/mem", "/proc/sysrq-trigger"):  # fmt: skip
        yield f"write {path}", lambda path=path: write(path)
    yield "write the run dir", lambda: (write("/run/initd/.x"), os.unlink("/run/initd/.x"))
    yield "remove the socket", lambda: os.unlink("/run/initd/control.sock") is None
    yield "replace the policy", lambda: os.rename("/workspace/.aidevcontainer", "/workspace/old") is None
    for name, pid in ours().items():
        yield from against(name, pid)


def main(*wanted):
    results = {}
    for name, attack in attacks():
        if wanted and name not in wanted:
            continue
        child = os.fork()  # one attack must not spoil the next
        if child == 0:
            try:
                os._exit(0 if attack() else 1)
            except BaseException:
                os._exit(1)
        results[name] = os.waitpid(child, 0)[1] == 0
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
