from __future__ import annotations

import datetime as dt
import json
import socket
import ssl
import threading
import time
from ipaddress import ip_address, ip_network

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from initd import github
from initd.errors import InitdError
from initd.github import FeedError, fetch_meta, parse_meta

META = json.dumps(
    {
        "verifiable_password_authentication": False,
        "ssh_keys": ["ssh-ed25519 AAAA"],
        "web": ["192.0.2.0/24", "2001:db8:1::/48"],
        "api": ["198.51.100.8/32", "192.0.2.0/25"],
        "git": ["203.0.113.0/25", "203.0.113.128/25", "2001:db8:1::/48"],
        "actions": ["20.0.0.0/8"],
    }
).encode()
RANGES = tuple(ip_network(text) for text in ("192.0.2.0/24", "198.51.100.8/32", "203.0.113.0/24", "2001:db8:1::/48"))
LOOPBACK = ip_address("127.0.0.1")


# ---- the document


def test_ranges_are_sorted_merged_and_without_runners():
    assert parse_meta(META) == RANGES


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10.1.2.0/24", "10.1.2.0/24 is in the special range 10.0.0.0/8"),
        ("127.0.0.1", "127.0.0.1 is in the special range 127.0.0.0/8"),
        ("169.254.169.254/32", "169.254.169.254/32 is in the special range 169.254.0.0/16"),
        ("100.64.0.0/10", "100.64.0.0/10 is in the special range 100.64.0.0/10"),
        ("172.0.0.0/8", "172.0.0.0/8 is in the special range 172.16.0.0/12"),
        ("fd00::/16", "fd00::/16 is in the special range fc00::/7"),
        ("::ffff:192.0.2.0/120", "::ffff:192.0.2.0/120 is in the special range ::ffff:0:0/96"),
        ("2002:c000:200::/40", "2002:c000:200::/40 is in the special range 2002::/16"),
        ("0.0.0.0/0", "'0.0.0.0/0' would list everything"),
        ("::/0", "'::/0' would list everything"),
        ("4.0.0.0/7", "'4.0.0.0/7' is too broad: at most /8 for IPv4"),
        ("2000::/15", "'2000::/15' is too broad: at most /16 for IPv6"),
        ("192.0.2.1/24", "'192.0.2.1/24' is not a range"),
        ("github.com", "'github.com' is not a range"),
        ("", "'' is not a range"),
        (3221225985, "3221225985 is not text"),
        (None, "None is not text"),
        (["192.0.2.0/24"], "['192.0.2.0/24'] is not text"),
    ],
)
def test_a_bad_range_is_skipped_and_reported(text, reason):
    seen = []
    raw = json.dumps({"web": [text, "192.0.2.0/24"]}).encode()
    assert parse_meta(raw, report=seen.append) == (ip_network("192.0.2.0/24"),)
    assert seen == [reason] or (isinstance(text, str) and seen[0].endswith(reason.partition(" ")[2]))
    assert parse_meta(raw) == (ip_network("192.0.2.0/24"),)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "is not JSON"),
        (b"<html>", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[]", "is not an object"),
        (b"null", "is not an object"),
        (b"{}", "holds no usable range"),
        (b'{"actions": ["192.0.2.0/24"]}', "holds no usable range"),
        (b'{"web": ["10.0.0.0/8"]}', "holds no usable range"),
        (b'{"web": "192.0.2.0/24"}', "is not a list"),
        (b'{"web": {"192.0.2.0/24": 1}}', "is not a list"),
        (b'{"web": ["192.0.2.0/24"], "git": null}', "is not a list"),
        (json.dumps({"web": ["192.0.2.0/24"] * 5001}).encode(), "has 5001 ranges, more than 5000"),
        (b'{"web": ["192.0.2.0/24"]}' + b" " * github.MAX_BYTES, "is larger than 5 MiB"),
    ],
)
def test_an_unusable_document_is_an_error(raw, reason):
    with pytest.raises(FeedError, match=reason):
        parse_meta(raw)


def test_as_many_ranges_as_allowed():
    texts = [f"198.{18 + 33 + i // 256}.{i % 256}.0/24" for i in range(github.MAX_RANGES)]
    assert parse_meta(json.dumps({"git": texts}).encode())


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["192.0.2.0/24"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(github.KEYS), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=80), JSON.map(lambda value: json.dumps(value).encode())))
def test_any_document_is_ranges_or_a_feed_error(raw):
    try:
        seen = parse_meta(raw)
    except FeedError:
        seen = ()
    assert all(network.prefixlen >= 8 for network in seen)


# ---- the saved copy


def test_save_and_load(tmp_path):
    path = tmp_path / "meta.json"
    assert github.load_saved(path) is None
    github.save(path, META)
    assert github.load_saved(path) == RANGES
    github.save(path, b'{"web": ["192.0.2.0/24"]}')
    assert github.load_saved(path) == (ip_network("192.0.2.0/24"),)
    assert [entry.name for entry in tmp_path.iterdir()] == ["meta.json"]


def test_a_failed_save_leaves_the_old_copy_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "meta.json"
    github.save(path, META)

    def full(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        github.save(path, b"{}")
    assert github.load_saved(path) == RANGES
    assert [entry.name for entry in tmp_path.iterdir()] == ["meta.json"]


def test_a_damaged_copy_is_an_error(tmp_path):
    (tmp_path / "meta.json").write_bytes(META[:100])
    with pytest.raises(InitdError, match="not JSON"):
        github.load_saved(tmp_path / "meta.json")
    with pytest.raises(InitdError, match="is a directory"):
        github.load_saved(tmp_path)


# ---- the network: a real TLS server on loopback, with a certificate authority of its own


class Authority:
    """A throw-away CA in `path`, and certificates it signed."""

    def __init__(self, path):
        self.path = path
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign("test CA", self.key, None)
        self.pem = path / "ca.pem"
        self.pem.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def _sign(self, name, key, names):
        now = dt.datetime.now(dt.UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = subject if names is None else self.certificate.subject
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
        )
        if names is not None:
            alternatives = x509.SubjectAlternativeName([x509.DNSName(one) for one in names])
            builder = builder.add_extension(alternatives, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def server_context(self, name):
        key = ec.generate_private_key(ec.SECP256R1())
        pem = self.path / f"{name}.pem"
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + self._sign(name, key, [name]).public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        return context


class Server:
    """Accepts on loopback and lets `answer(tls)` talk; remembers the requests and server names it saw."""

    def __init__(self, authority, answer, *, name=github.HOST):
        self.requests = []
        self.names = []
        self._answer = answer
        self._context = authority.server_context(name)
        self._context.sni_callback = lambda _socket, sni, _context: self.names.append(sni)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(plain, server_side=True) as tls:
                    self.requests.append(tls.recv(4096))
                    self._answer(tls)
            except OSError:
                plain.close()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def authority(tmp_path, monkeypatch):
    made = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.pem))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    return made


@pytest.fixture
def serve(authority):
    servers = []

    def start(answer, **options):
        servers.append(Server(authority, answer, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def response(body, *, status="200 OK", headers=""):
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def test_fetch(serve):
    server = serve(lambda tls: tls.sendall(response(META)))
    assert fetch_meta([LOOPBACK], timeout=20, port=server.port) == META
    assert server.names == ["api.github.com"]
    request = server.requests[0].decode()
    assert request.startswith("GET /meta HTTP/1.1\r\nHost: api.github.com\r\nUser-Agent: initd/")
    assert request.endswith("\r\n\r\n")


def test_fetch_chunked_and_in_pieces(serve):
    def answer(tls):
        tls.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(META), 50):
            piece = META[start : start + 50]
            tls.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            time.sleep(0.002)
        tls.sendall(b"0\r\n\r\n")

    assert fetch_meta([LOOPBACK], timeout=20, port=serve(answer).port) == META


def test_next_address_is_tried(serve):
    server = serve(lambda tls: tls.sendall(response(META)))
    # Nobody listens on 127.0.0.2.
    assert fetch_meta([ip_address("127.0.0.2"), LOOPBACK], timeout=20, port=server.port) == META


def test_an_address_that_says_nothing_leaves_time_for_the_next(serve):
    server = serve(lambda tls: tls.sendall(response(META)))
    with socket.create_server(("127.0.0.3", server.port)):  # accepts in the kernel, never answers the handshake
        started = time.monotonic()
        assert fetch_meta([ip_address("127.0.0.3"), LOOPBACK], timeout=4, port=server.port) == META
        assert 1.9 < time.monotonic() - started < 3.9


def test_nobody_there(authority):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1: .*refused"):
        fetch_meta([LOOPBACK], timeout=20, port=port)
    with pytest.raises(ConnectionError, match=r"no address of api\.github\.com"):
        fetch_meta([], timeout=5)


def test_certificate_of_another_name_is_refused_before_anything_is_asked(serve):
    server = serve(lambda tls: tls.sendall(response(META)), name="evil.example")
    with pytest.raises(ConnectionError, match=r"not valid for .api\.github\.com."):
        fetch_meta([LOOPBACK], timeout=20, port=server.port)
    assert server.requests == []


def test_certificate_of_an_unknown_authority_is_refused(serve, tmp_path, monkeypatch):
    server = serve(lambda tls: tls.sendall(response(META)))
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", str(Authority(tmp_path / "other").pem))
    with pytest.raises(ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch_meta([LOOPBACK], timeout=20, port=server.port)
    assert server.requests == []


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (response(b"", status="403 rate limit exceeded"), "answered 403 rate limit exceeded"),
        (response(b"", status="301 Moved", headers="Location: https://evil.example/\r\n"), "answered 301"),
        (response(META, status="500 Oops"), "answered 500"),
        (response(META)[:-10], "is cut off or not HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "is cut off or not HTTP"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "is cut off or not HTTP"),
        (b"", "is cut off or not HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n", "is cut off or not HTTP"),
    ],
)
def test_bad_answers(serve, raw, reason):
    server = serve(lambda tls: tls.sendall(raw))
    with pytest.raises(FeedError, match=reason):
        fetch_meta([LOOPBACK], timeout=20, port=server.port)


def test_endless_answer_is_cut(serve):
    sent = []

    def answer(tls):
        tls.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(20):
            tls.sendall(b" " * (1 << 20))
            sent.append(1)

    with pytest.raises(FeedError, match="larger than 5 MiB"):
        fetch_meta([LOOPBACK], timeout=10, port=serve(answer).port)
    assert len(sent) < 20


def test_dripping_answer_ends_at_the_deadline(serve):
    stop = threading.Event()

    def answer(tls):
        tls.sendall(b"HTTP/1.1 200 OK\r\n")
        for _ in range(200):  # 10 s, so that a client without a deadline fails the test instead of hanging it
            if stop.wait(0.05):
                return
            tls.sendall(b"X-Drip: y\r\n")

    server = serve(answer)
    started = time.monotonic()
    try:
        with pytest.raises(OSError, match=r"timed out|no answer in time"):
            fetch_meta([LOOPBACK], timeout=0.5, port=server.port)
        assert 0.4 < time.monotonic() - started < 5
    finally:
        stop.set()
