"""One soak: a box under a seeded schedule of changes and faults, while sessions try what is listed and what is not.

The main thread changes things and counts what reaches the internet; a second thread is the sessions. Both write what
went wrong to `problems`; a soak without any has passed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from tests.soak import world
from tests.soak.figures import ROLES, Figures
from tests.soak.schedule import events
from tests.soak.world import History
from tests.support.attempts import attempt_all, client
from tests.support.box import BoxError
from tests.support.lab import Lab
from tests.support.namespaces import LabError
from tests.support.remote import RESOLVER4, THIRD4
from tests.support.zone import Fault

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.soak.schedule import Event
    from tests.support.attempts import Target
    from tests.support.box import Box, Session

PAUSE = 0.7  # seconds between two sessions: the load is bounded
TICK = 0.1
KEPT = 50  # problems that are told in full; all are counted
DOWNLOADS_AT_ONCE = 3
BACK = 20.0  # seconds that a killed warden's successor may take on a loaded machine; it takes 0.6 s on an idle one
PATIENCE = 3  # tries of what a loaded machine may make late


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`meddle` is called once, half-way, with the lab: how a test makes sure that a broken box is noticed."""

    seconds: float
    seed: int
    backend: str = "auto"
    every: float = 10.0  # seconds between two lines of progress
    meddle: Callable[[Lab], object] | None = None


@dataclass(slots=True)
class Download:
    """A session that is to receive bytes until `until`."""

    session: Session
    path: Path
    until: float
    seen: int = 0
    changed: float = field(default_factory=time.monotonic)


class Soak:
    """Runs one plan; afterwards `problems`, `counts` and `figures` tell what happened."""

    def __init__(self, plan: Plan, lab: Lab, *, say: Callable[[str], object]) -> None:
        self.plan, self.lab = plan, lab
        self.history, self.figures = History(), Figures()
        self.counts: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.told: list[str] = []
        self.recoveries: list[float] = []  # seconds from SIGKILL to the next warden's answer to `fwctl status`
        self.elapsed = 0.0
        self.interrupted = False
        self._say, self._lock = say, threading.Lock()
        self._pool: set[str] = set(world.POOL[:8])
        self._downloads: list[Download] = []
        self._storms: list[Session] = []
        self._mend_at: float | None = None
        self._over = threading.Event()
        self._names = count()
        self._begin = time.monotonic()
        self.box: Box = lab.box(
            policy=world.policy(self._pool),
            resolv_conf=f"nameserver {RESOLVER4}\nnameserver {THIRD4}\n",
            env={
                "INITD_DNS_FLOOR": str(world.FLOOR),
                "INITD_DNS_GRACE": str(world.GRACE),
                "INITD_BACKEND": plan.backend,
                "INITD_LOG_LEVEL": "warning",
            },
        )

    # The run

    def run(self) -> None:
        """All of it, the box's stop too. Ctrl-C ends the schedule early and is noted in `interrupted`."""
        self.lab.dns.load(world.entries())
        self._rotate({"to": [0, 1]})
        self._rotate_downloads({"to": 0})
        self.history.listed(self._pool, time.monotonic(), done=False)
        self.box.start()
        self.history.listed(self._pool, time.monotonic(), done=True)
        self._begin = time.monotonic()
        sessions = threading.Thread(target=self._sessions, name="sessions")
        sessions.start()
        try:
            self._follow()
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            self.elapsed = time.monotonic() - self._begin
            self._over.set()
            sessions.join()
        self._finish()

    def _follow(self) -> None:
        """Do what the schedule says, look at the box in between."""
        schedule = events(self.plan.seed, self.plan.seconds)
        event = next(schedule, None)
        every = {self._look: 2.0, self._count: 1.0, self._progress: self.plan.every}
        due = dict.fromkeys(every, 0.0) | {self._progress: self.plan.every}
        meddle_at = self.plan.seconds / 2 if self.plan.meddle else None
        while (now := time.monotonic() - self._begin) < self.plan.seconds:
            if event is not None and now >= event.at:
                self._do(event)
                event = next(schedule, None)
            for duty, period in every.items():
                if now >= due[duty]:
                    due[duty] = now + period
                    duty()
            self._tend()
            if meddle_at is not None and now >= meddle_at and self.plan.meddle is not None:
                self.plan.meddle(self.lab)
                meddle_at = None
            if not self.box.running:
                self._problem("box", f"PID 1 has ended with {self.box.wait()}: {self.box.logs().text[-2000:]}")
                return
            if signal.sigtimedwait([signal.SIGINT], TICK):
                raise KeyboardInterrupt

    def _do(self, event: Event) -> None:
        action: Callable[[dict[str, Any]], None] = getattr(self, f"_{event.kind}")
        self.counts[event.kind] += 1
        try:
            action(event.how)
        except (BoxError, LabError, subprocess.TimeoutExpired, OSError, ValueError) as error:
            self._problem(event.kind, repr(error))

    def _finish(self) -> None:
        """Quiet first; then the last account: packets, processes, health, log, stop."""
        with contextlib.suppress(LabError):
            self._mend()
        for storm in self._storms:
            with contextlib.suppress(subprocess.TimeoutExpired):  # then the box's stop shows what it is worth
                storm.wait(60)
        for download in self._downloads:
            download.until = 0.0
        self._tend()
        if self.box.running:
            time.sleep(2.0)
            self._look()
            time.sleep(1.0)
            self._look()
            self._health({})
            self._stop()
        self._count()
        for pid, parent in sorted(self.figures.stuck):
            self._problem("zombie", f"{pid}, a child of {parent}")
        for role in ROLES:
            trend = self.figures.trend(role)
            if trend is not None and not trend.flat:
                self._problem("growth", f"{role}: RSS {trend.rss} KiB, descriptors {trend.fds}")
        self._read_log()

    def _stop(self) -> None:
        try:
            stopped = self.box.stop(timeout=30.0)
        except BoxError as error:
            self._problem("stop", str(error)[:500])
            return
        if stopped.code != 0:
            self._problem("stop", f"exit code {stopped.code}")

    def _read_log(self) -> None:
        """A duty that failed or an exception that nobody expected is a problem, whatever it led to."""
        logs = self.box.logs()
        for event in logs.events:
            if event.get("event") in {"upkeep.failed", "keeper.lost", "warden.silent"} or "exception" in event:
                self._problem("log", json.dumps(event)[:600])
        if "Traceback" in logs.text and not self.problems["log"]:
            self._problem("log", logs.text[logs.text.index("Traceback") :][:600])

    # What is done to the box

    def _reload(self, how: dict[str, Any]) -> None:
        pool: set[str] = how["pool"]
        self.history.listed(pool, time.monotonic(), done=False)
        self.box.write_policy(world.policy(pool))
        done = self.box.fwctl("reload", "--json", timeout=60)
        if done.returncode:
            self._problem("reload", f"exit code {done.returncode}: {done.stdout}{done.stderr}")
            return
        self.history.listed(pool, time.monotonic(), done=True)
        self._pool = pool

    def _bad_reload(self, how: dict[str, Any]) -> None:
        """Refused, with the file named; the file stays as it is, whatever happens next."""
        self.box.write_policy(world.policy(set(world.POOL)) + how["line"] + "\n")
        done = self.box.fwctl("reload", "--json", timeout=60)
        if done.returncode != 78:
            self._problem("bad_reload", f"{how['line']!r}: {done.returncode}: {done.stdout}{done.stderr}")

    def _rotate(self, how: dict[str, Any]) -> None:
        pairs = [world.ROTATION[index] for index in how["to"]]
        everything = tuple(address for pair in world.ROTATION for address in pair)
        fresh = {address for pair in pairs for address in pair}
        before = {address for address in everything if (spans := self.history.given.get(address)) and spans.open}
        self.history.give(before | fresh, time.monotonic(), among=everything)
        records = {"A": [pair[0] for pair in pairs], "AAAA": [pair[1] for pair in pairs]}
        self.lab.dns.set(world.ROTATING, records, ttl=1)
        self.history.give(fresh, time.monotonic(), among=everything)

    def _rotate_downloads(self, how: dict[str, Any]) -> None:
        self.lab.dns.set(world.DOWNLOADS, {"A": world.DOWNLOAD_ROTATION[how["to"]]}, ttl=1)

    def _fault(self, how: dict[str, Any]) -> None:
        servers = {"both": (RESOLVER4, THIRD4), "first": (RESOLVER4,), "second": (THIRD4,)}[how["whom"]]
        slow = how["fault"] == "slow"  # answers all the same, so nothing may fail
        if how["whom"] == "both" and not slow:
            self.history.dns_bad.begin(time.monotonic())
        for server in servers:
            self.lab.dns.server(server, fault=None if slow else Fault(how["fault"]), delay=1.2 if slow else 0.0)
        self._mend_at = time.monotonic() + how["seconds"]

    def _mend(self) -> None:
        for server in (RESOLVER4, THIRD4):
            self.lab.dns.server(server)
        self.history.dns_bad.end(time.monotonic())
        self._mend_at = None

    def _kill(self, how: dict[str, Any]) -> None:
        """Straight after a reload, half the time: what it said must hold for the next warden, too."""
        if how["after_reload"]:
            self._reload(how)
        pids = self.box.pids()
        if "warden" not in pids:
            self._problem("kill", "there is no warden to kill")
            return
        begin = time.monotonic()
        os.kill(pids["warden"], signal.SIGKILL)
        while self.box.fwctl("status", "--json").returncode:
            if time.monotonic() > begin + BACK:
                self._problem("kill", f"no warden that answers within {BACK:.0f} s")
                return
        self.recoveries.append(time.monotonic() - begin)

    def _orphans(self, how: dict[str, Any]) -> None:
        storm = self.box.popen(client("orphans", str(how["count"])), stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        self._storms.append(storm)

    def _download(self, how: dict[str, Any]) -> None:
        """Starts when DNS works; then nothing that happens to names may end it."""
        now = time.monotonic()
        if len(self._downloads) >= DOWNLOADS_AT_ONCE or self.history.dns_bad.touch(now - world.SETTLE, now):
            self.counts["download"] -= 1
            return
        path = self.box.directory / f"download-{next(self._names)}"
        url = f"http://{world.DOWNLOADS}/drip?rate=1000"
        with path.open("wb") as file:
            session = self.box.popen(["curl", "-sSN", "--retry", "3", "--retry-all-errors", url], stdout=file,
                                     stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        self._downloads.append(Download(session, path, now + how["seconds"]))

    def _health(self, _how: dict[str, Any]) -> None:
        """Healthy, or healthy again at one of the next tries: the warden may be on its way back."""
        for _ in range(PATIENCE):
            done = self.box.fwctl("health", "--json", timeout=60)
            checks = json.loads(done.stdout or "{}").get("checks", [])
            # The disk is this machine's affair.
            bad = [one for one in checks if not one["ok"] and one["name"] != "disk"]
            if checks and not bad:
                return
            time.sleep(2.0)
        self._problem("health", f"{bad or done.stdout + done.stderr}")

    # What is looked at

    def _tend(self) -> None:
        """End what is over: faults, downloads, storms."""
        now = time.monotonic()
        if self._mend_at is not None and now >= self._mend_at:
            self._mend()
        self._storms = [storm for storm in self._storms if storm.poll() is None]
        for download in list(self._downloads):
            size = download.path.stat().st_size
            if size > download.seen:
                download.seen, download.changed = size, now
            ended = download.session.poll() is not None
            if ended or now - download.changed > 15.0:
                words = f"curl ended with {download.session.returncode}" if ended else "15 s without a byte"
                self._problem("download", f"{words} after {size} bytes")
            if ended or now - download.changed > 15.0 or now >= download.until:
                self._end(download)

    def _end(self, download: Download) -> None:
        self._downloads.remove(download)
        if download.session.poll() is None:
            download.session.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            download.session.wait(10)
        self.counts["bytes downloaded"] += download.path.stat().st_size
        download.path.unlink()

    def _look(self) -> None:
        self.figures.take(self.box)

    def _count(self) -> None:
        """Judge what has reached the internet since the last time."""
        packets, questions = self.lab.take()
        self.counts["packets"] += len(packets)
        self.counts["questions"] += len(questions)
        for packet in packets:
            if why := self.history.leak(packet):
                self._problem("leak", why)
        for question in questions:
            if why := self.history.leaked_question(question):
                self._problem("leak", why)

    def _progress(self) -> None:
        seen = {role: last for role in ROLES if (last := self.figures.last(role))}
        parts = [f"{role} {last.rss / 1024:.1f} MB {last.fds} fds" for role, last in seen.items()]
        done = self.counts
        self._say(
            f"{time.monotonic() - self._begin:9.1f} s  {done['session']} sessions, {done['listed']} listed and "
            f"{done['refused']} refused as they should; {done['packets']} packets; {', '.join(parts)}; "
            f"{self.problems.total()} problems"
        )

    def _problem(self, kind: str, text: str) -> None:
        with self._lock:
            self.problems[kind] += 1
            if len(self.told) < KEPT:
                line = f"{time.monotonic() - self._begin:9.1f} s  PROBLEM {kind}: {text}"
                self.told.append(line)
                self._say(line)

    # The sessions

    def _sessions(self) -> None:
        """Come and go until it is over; each tries some of what is listed and some of what is not."""
        chance = random.Random(self.plan.seed + 1)
        while not self._over.wait(PAUSE):
            targets: list[Target] = [
                *chance.sample(world.ALWAYS_LISTED, 2),
                *chance.sample(world.ALWAYS_REFUSED, 3),
                *(("tcp", name, 443) for name in chance.sample(world.POOL, 3)),
                ("tcp", f"h{chance.randrange(100)}.{world.WILD}", 443),
            ]
            chance.shuffle(targets)
            try:
                late = self._try(targets)
                for _ in range(world.RETRIES - 1):
                    if not late or self._over.wait(1.0):
                        break
                    self.counts["late"] += 1
                    late = self._try(list(late))
                for why in late.values():
                    self._problem("false refusal", why)
            except (LabError, BoxError, subprocess.TimeoutExpired, OSError, ValueError) as error:
                if not self._over.is_set():
                    self._problem("session", repr(error)[:500])

    def _try(self, targets: list[Target]) -> dict[Target, str]:
        """One session. What was wrong and may only have been late; everything else that was wrong is told."""
        begin = time.monotonic()
        outcomes = attempt_all(self.box, targets)
        end = time.monotonic()
        self.counts["session"] += 1
        late = {}
        for target, outcome in zip(targets, outcomes, strict=True):
            expected = self.history.expected(target, begin, end)
            why = self.history.wrong(target, outcome, begin=begin, end=end)
            if why is None:
                self.counts[{True: "listed", False: "refused", None: "unjudged"}[expected]] += 1
            elif outcome.error in world.LATE:
                late[target] = why
            else:
                self._problem("false refusal" if expected else "leak", why)
        return late
