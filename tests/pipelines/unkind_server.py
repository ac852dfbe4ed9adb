"""An HTTP server on loopback that behaves as badly as the web, by path; and one that speaks TLS, or pretends to."""

from __future__ import annotations

import gzip
import ipaddress
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DRIP_SECONDS = 0.05
DRIPS = 120  # six seconds
VAST_BYTES = 200_000_000
LONG_BYTES = 12_000_000


class Unkind(BaseHTTPRequestHandler):
    """Behaves by path; `robots` is what it answers for /robots.txt, and `onward` where /onward leads."""

    protocol_version = "HTTP/1.1"
    hits: Counter[str] = Counter()
    robots: dict[str, Any] = {"status": 404}
    onward = ""
    sent_at = 0.0  # when /long sent something last

    def do_GET(self) -> None:
        self.hits[self.path] += 1
        name = self.path.strip("/").partition("?")[0].replace("-", "_").replace(".", "_") or "root"
        getattr(self, f"on_{name}", self.on_missing)()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def on_robots_txt(self) -> None:
        self.answer(**self.robots)

    def on_good(self) -> None:
        self.answer(200, b"picture of " + self.headers["Host"].encode())

    def on_agent(self) -> None:
        self.answer(200, self.headers["User-Agent"].encode())

    def on_missing(self) -> None:
        self.answer(404)

    def on_flaky(self) -> None:
        self.answer(200, b"at last") if self.hits["/flaky"] > 1 else self.answer(503, Retry_After="0")

    def on_patient(self) -> None:
        self.answer(200, b"at last") if self.hits["/patient"] > 1 else self.answer(429, Retry_After="1")

    def on_busy(self) -> None:
        self.answer(429, Retry_After="60")

    def on_failing(self) -> None:
        self.answer(500)

    def on_loop(self) -> None:
        self.answer(302, Location="/loop")

    def on_hop(self) -> None:
        self.answer(301, Location="http://b.test/good")

    def on_onward(self) -> None:
        self.answer(302, Location=self.onward)

    def on_optout(self) -> None:
        self.answer(200, b"x" * 100, X_Robots_Tag="otherbot: noarchive, noai")

    def on_optout_dated(self) -> None:
        self.answer(200, b"x" * 100, X_Robots_Tag="unavailable_after: 25 Jun 2030 15:00:00 PST, noml")

    def on_reserved(self) -> None:
        self.answer(200, b"x" * 100, TDM_Reservation="1")

    def on_large(self) -> None:
        self.answer(200, b"x" * 300_000)

    def on_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(2000):
            self.wfile.write(b"x" * 1000)

    def on_vast(self) -> None:
        """Says how long it is in /vast?told, and not in others."""
        self.send_response(200)
        if self.path.endswith("?told"):
            self.send_header("Content-Length", str(VAST_BYTES))
        self.end_headers()
        for _ in range(VAST_BYTES // 1_000_000):
            self.wfile.write(bytes(1_000_000))
        self.close_connection = True

    def on_untold(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(bytes(600_000))
        self.close_connection = True

    def on_long(self) -> None:
        """Does not say how long it is, and keeps its end until no other has anything left to send for a while."""
        self.send_response(200)
        self.end_headers()
        for _ in range(LONG_BYTES // 1_000_000):
            self.wfile.write(bytes(1_000_000))
            Unkind.sent_at = time.monotonic()
        while time.monotonic() < Unkind.sent_at + 1.0:
            time.sleep(0.05)
        self.close_connection = True

    def on_gzip_bomb(self) -> None:
        self.answer(200, gzip.compress(bytes(50_000_000)), Content_Encoding="gzip")

    def on_short(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)
        self.close_connection = True

    def on_half_close(self) -> None:
        self.connection.shutdown(socket.SHUT_WR)
        self.close_connection = True

    def on_drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(DRIPS):
            self.wfile.write(b"x")
            time.sleep(DRIP_SECONDS)

    def on_dripping_headers(self) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"y" * (DRIPS - 25):
            self.wfile.write(bytes([byte]))
            time.sleep(DRIP_SECONDS)

    def on_never(self) -> None:
        time.sleep(DRIPS * DRIP_SECONDS)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    # With the 5 of the standard library a ninth of nine connections at once waits a second for its second SYN.
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Says nothing: clients that leave early are the point here."""


@contextmanager
def unkind_server(tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The server for the time of the block; yields its address."""
    server = Server(("127.0.0.1", 0), Unkind)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Listens on loopback and lets `answer` do what it likes with each connection."""

    def talk(connection: socket.socket) -> None:
        with connection:
            try:
                answer(connection)
            except OSError:
                return

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=listen, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def drip_handshake(connection: socket.socket) -> None:
    """The beginning of a TLS record, byte by byte."""
    for byte in b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03" + bytes(DRIPS - 11):
        connection.sendall(bytes([byte]))
        time.sleep(DRIP_SECONDS)


def certificate(folder: Path, host: str) -> tuple[Path, ssl.SSLContext]:
    """A certificate that a host has signed itself: (file to trust, the server's side)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    names = x509.SubjectAlternativeName([x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
        .add_extension(names, critical=False).add_extension(x509.BasicConstraints(True, None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    public, private = folder / f"{host}.pem", folder / f"{host}.key"
    public.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                          serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return public, context
