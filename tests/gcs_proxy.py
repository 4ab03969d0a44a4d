"""A proxy that answers for googleapis.com itself, so that TensorFlow's gs:// reaches a fake.

TensorFlow has Google's hosts built in and speaks TLS only, but it obeys HTTPS_PROXY and trusts the
authorities in CURL_CA_BUNDLE: CONNECT is answered with a certificate of a throw-away authority, and
the requests inside are handled as if they had come in the clear.
"""

import datetime
import os
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_AUTHORITY_FILE = "authority.pem"
_HOSTS = ("*.googleapis.com", "googleapis.com")


def _make_tls_context(folder: str) -> ssl.SSLContext:
    """A server's context for Google's hosts; its authority's certificate goes to `folder`."""
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = _name("throw-away authority")
    authority = (
        _certificate(issuer, issuer, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    hosts = x509.SubjectAlternativeName([x509.DNSName(host) for host in _HOSTS])
    certificate = (
        _certificate(_name(_HOSTS[0]), issuer, key)
        .add_extension(hosts, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    with open(os.path.join(folder, _AUTHORITY_FILE), "wb") as file:
        file.write(authority.public_bytes(serialization.Encoding.PEM))
    server = os.path.join(folder, "server.pem")
    with open(server, "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server)
    return context


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


class ProxyHandler(BaseHTTPRequestHandler):
    """Answers CONNECT and goes on inside the TLS connection."""

    protocol_version = "HTTP/1.1"
    tls_context: ssl.SSLContext

    def do_CONNECT(self) -> None:
        """Takes the connection over instead of passing it on."""
        self.send_response(200)
        self.end_headers()
        self.connection = self.tls_context.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", buffering=0)
        self.close_connection = False

    def log_message(self, *arguments: object) -> None:
        """Keeps requests out of the tests' output."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Lets clients break off, which killed processes do, but not a fault of our own pass."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextmanager
def serve_proxy(handler: type[ProxyHandler], folder: str) -> Iterator[dict[str, str]]:
    """Serves a handler; gives the environment in which a process takes it for Google's hosts.

    Args:
      handler: of the requests inside the TLS connections.
      folder: for certificates.
    """
    handler.tls_context = _make_tls_context(folder)
    server = _Server(("127.0.0.1", 0), handler)
    # It looks that often whether it is to end.
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield {
            "HTTPS_PROXY": f"http://127.0.0.1:{server.server_port}",
            "CURL_CA_BUNDLE": os.path.join(folder, _AUTHORITY_FILE),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "NO_GCE_CHECK": "true",
        }
    finally:
        server.shutdown()
        server.server_close()
