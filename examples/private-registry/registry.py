"""A package index (PEP 503) with one package, made on the spot: hello-box 1.0."""

import io
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WHEEL = "hello_box-1.0-py3-none-any.whl"


def wheel() -> bytes:
    info = "hello_box-1.0.dist-info"
    files = {
        "hello_box.py": "print('hello from the private registry')\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: hello-box\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: registry.py\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()


class Index(BaseHTTPRequestHandler):
    pages = {
        "/simple/hello-box/": ("text/html", f'<!DOCTYPE html><a href="/{WHEEL}">{WHEEL}</a>'.encode()),
        f"/{WHEEL}": ("application/zip", wheel()),
    }

    def do_GET(self) -> None:
        kind, body = self.pages.get(self.path, ("", b""))
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", kind or "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("", 8000), Index).serve_forever()
