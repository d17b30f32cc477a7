"""One library, `lib`, as every package manager's registry serves it: what the lab's web servers hand out."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile

HOST = "site.example"
"""Where the archives are; it is listed in every policy that these files are used with."""
GO_MODULE = "lib.example/lib"
_CARGO = '[package]\nname = "lib"\nversion = "1.0.0"\nedition = "2021"\n'
_WHEEL = "lib-1.0.0.dist-info"


def files() -> dict[str, tuple[str, bytes]]:
    """Path to content type and content, for Web.files."""
    crate = _tar({"lib-1.0.0/Cargo.toml": _CARGO, "lib-1.0.0/src/lib.rs": ""})
    tarball = {"tarball": f"https://{HOST}/lib-1.0.0.tgz"}
    package = {"name": "lib", "version": "1.0.0"}
    entry = {"name": "lib", "vers": "1.0.0", "deps": [], "cksum": hashlib.sha256(crate).hexdigest(), "features": {}}
    go = f"/go/{GO_MODULE}/@v"
    module = f"module {GO_MODULE}\n"
    return {
        # git's dumb protocol: a repository without commits (gitprotocol-http(5))
        "/lib.git/info/refs": _text(""),
        "/lib.git/HEAD": _text("ref: refs/heads/main\n"),
        "/npm/lib": _json(
            {"name": "lib", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": {**package, "dist": tarball}}}
        ),
        "/lib-1.0.0.tgz": _archive(_tar({"package/package.json": json.dumps(package)})),
        "/simple/lib/": ("text/html", b'<a href="/lib-1.0.0-py3-none-any.whl">lib-1.0.0-py3-none-any.whl</a>'),
        "/lib-1.0.0-py3-none-any.whl": _archive(
            _zip(
                {
                    f"{_WHEEL}/METADATA": "Metadata-Version: 2.1\nName: lib\nVersion: 1.0.0\n",
                    f"{_WHEEL}/WHEEL": "Wheel-Version: 1.0\nGenerator: lab\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                    f"{_WHEEL}/RECORD": "",
                }
            )
        ),
        "/index/config.json": _json({"dl": f"https://{HOST}/crates"}),
        "/index/3/l/lib": _json(entry | {"yanked": False}),
        "/crates/lib/1.0.0/download": _archive(crate),
        f"{go}/list": _text("v1.0.0\n"),
        f"{go}/v1.0.0.info": _json({"Version": "v1.0.0"}),
        f"{go}/v1.0.0.mod": _text(module),
        f"{go}/v1.0.0.zip": _archive(
            _zip({f"{GO_MODULE}@v1.0.0/go.mod": module, f"{GO_MODULE}@v1.0.0/lib.go": "package lib\n"})
        ),
    }


def _text(text: str) -> tuple[str, bytes]:
    return "text/plain", text.encode()


def _json(value: object) -> tuple[str, bytes]:
    return "application/json", json.dumps(value).encode()


def _archive(data: bytes) -> tuple[str, bytes]:
    return "application/octet-stream", data


def _tar(members: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def _zip(members: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return out.getvalue()
