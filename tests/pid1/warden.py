"""A small real warden for tests of PID 1 and the keeper: stdlib only, does what its first argument says.

Modes: good, crash (after armed), hang (no heartbeat after armed), refuse CODE (before armed).
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from pathlib import Path


def write_down(run_dir: str, generation: int, descriptors: list[int]) -> None:
    """What a test may want to know about this warden."""
    with open(f"{run_dir}/warden.{generation}", "w") as file:
        json.dump(
            {
                "pid": os.getpid(),
                "fds": os.environ["INITD_FDS"],
                "ended": os.environ["INITD_ENDED"],
                "open": descriptors,
                "status": Path("/proc/self/status").read_text(),
                "ppid": os.getppid(),
                "time": time.monotonic(),
            },
            file,
        )


def main() -> int:  # noqa: C901  # read top to bottom
    mode = sys.argv[1] if len(sys.argv) > 1 else "good"
    keeper = socket.socket(fileno=int(os.environ["INITD_KEEPER_FD"]))
    run_dir = os.environ["INITD_RUN_DIR"]
    generation = int(os.environ["INITD_GENERATION"])
    write_down(run_dir, generation, sorted(int(fd) for fd in os.listdir("/proc/self/fd")))

    def send(**message):
        keeper.send(json.dumps(message).encode())

    if mode == "refuse":
        sys.stderr.write("initd: the test warden refuses\n")
        return int(sys.argv[2])
    if mode == "slow":
        time.sleep(float(sys.argv[2]))
    send(event="armed")
    if mode == "crash":
        time.sleep(0.05)
        return 3
    if mode == "hang":
        time.sleep(1000)
    fds = dict(part.split("=") for part in os.environ["INITD_FDS"].split(","))
    control = socket.socket(fileno=int(fds["control"]))
    waiting = {}
    number = 0
    beat = 0.0
    while True:
        if time.monotonic() - beat >= 5:
            os.pwrite(int(fds["pulse"]), struct.pack("d", time.monotonic()), 0)
            beat = time.monotonic()
        ready = select.select([keeper, control], [], [], max(0.0, beat + 5 - time.monotonic()))[0]
        if control in ready:  # a test asks: forward its line as a probe's plan
            client = control.accept()[0]
            number += 1
            text = client.recv(65536)
            if text.strip() == b"generation":
                client.sendall(str(generation).encode())
                client.close()
                continue
            waiting[number] = client
            send(event="probe", id=number, plan=json.loads(text))
        if keeper in ready:
            data = keeper.recv(1 << 20)
            if not data:
                time.sleep(0.05)  # the keeper is gone; go on serving
                keeper = control
                continue
            message = json.loads(data)
            if message["event"] == "stop":
                with open(f"{run_dir}/goodbye", "w") as file:
                    file.write(f"{time.monotonic()}")
                return 0
            if message["event"] == "probe":
                client = waiting.pop(message["id"])
                client.sendall(json.dumps(message).encode())
                client.close()


if __name__ == "__main__":
    sys.exit(main())
