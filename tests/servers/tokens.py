"""An OAuth server: gives signed tokens to the clients that it knows, over HTTPS."""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs

from tests.servers.certificates import Certificate, openssl

AUDIENCE, ISSUER = "kafka", "https://login.test"


class TokenServer:
    """Serves `/token` on the loopback, for the grant of client credentials (RFC 6749, 4.4).

    Attributes:
        keys: the file of the public keys, for the broker.
        life_s: how long the tokens live that are given from now on.
        given: how many were given.
        answer: what is answered instead, status and body; None for tokens.
    """

    def __init__(self, folder: Path, certificate: Certificate, clients: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._private, self.keys = folder / "sign.key", folder / "jwks.json"
        openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", self._private)
        modulus = openssl("rsa", "-in", self._private, "-noout", "-modulus").decode().strip().removeprefix("Modulus=")
        key = {"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "1", "e": "AQAB", "n": _text(bytes.fromhex(modulus))}
        self.keys.write_text(json.dumps({"keys": [key]}))
        self._clients = dict(clients)
        self.life_s, self.given = 3600.0, 0
        self.answer: tuple[int, bytes] | None = None
        self.forms: list[dict[str, list[str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                status, body = outer._respond(self)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate.file, certificate.key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """The token endpoint."""
        return f"https://127.0.0.1:{self._server.server_address[1]}/token"

    def token(self, subject: str) -> str:
        """A token, signed."""
        now = int(time.time())
        claims = {"sub": subject, "aud": AUDIENCE, "iss": ISSUER, "iat": now, "exp": int(now + self.life_s)}
        head = {"alg": "RS256", "typ": "JWT", "kid": "1"}
        signed = ".".join(_text(json.dumps(part).encode()) for part in (head, claims))
        signature = openssl("dgst", "-sha256", "-sign", self._private, data=signed.encode())
        return f"{signed}.{_text(signature)}"

    def _respond(self, request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        form = parse_qs(request.rfile.read(int(request.headers.get("Content-Length", "0"))).decode())
        self.forms.append(form)
        if self.answer is not None:
            return self.answer
        kind, _, login = request.headers.get("Authorization", "").partition(" ")
        client, _, secret = base64.b64decode(login).decode().partition(":")
        if kind != "Basic" or self._clients.get(client) != secret:
            return 401, b'{"error": "invalid_client"}'
        if form.get("grant_type") != ["client_credentials"]:
            return 400, b'{"error": "unsupported_grant_type"}'
        self.given += 1
        found: dict[str, Any] = {"token_type": "Bearer", "expires_in": self.life_s, "access_token": self.token(client)}
        return 200, json.dumps(found).encode()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
