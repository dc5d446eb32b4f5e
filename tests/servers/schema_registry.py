"""A schema registry for tests: a real HTTP server that speaks the few calls of the registries' REST API."""

from __future__ import annotations

import base64
import itertools
import json
import re
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from tests.servers.certificates import Certificate


class SchemaRegistryServer:
    """Leaving the context ends it. `stop` and `start` keep the port.

    Args:
        certificate: serve TLS with it; None serves without.

    Attributes:
        asked: the paths asked for, in order.
        status: answer everything with this HTTP status instead; None answers as a registry does.
        login: `user:password` that is wanted; None wants none.
    """

    def __init__(self, certificate: Certificate | None = None) -> None:
        self._certificate = certificate
        self.asked: list[str] = []
        self.status: int | None = None
        self.login: str | None = None
        self._ids = itertools.count(1)
        self._schemas: dict[int, dict[str, Any]] = {}
        self._subjects: dict[str, list[int]] = {}
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http{'s' if self._certificate else ''}://127.0.0.1:{self.port}"

    def register(
        self, schema: Any, *, subject: str = "any", kind: str = "AVRO", references: list[dict[str, Any]] | None = None
    ) -> int:
        """Add a schema as a subject's next version; its id."""
        number = next(self._ids)
        answer: dict[str, Any] = {"schema": schema if isinstance(schema, str) else json.dumps(schema)}
        if kind != "AVRO":  # as registries do, which leave the default out
            answer["schemaType"] = kind
        if references:
            answer["references"] = references
        self._schemas[number] = answer
        self._subjects.setdefault(subject, []).append(number)
        return number

    def start(self) -> Self:
        """Listen."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self._server.daemon_threads = True
        if self._certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self._certificate.file, self._certificate.key)
            plain = self._server.socket
            self._server.socket = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def answer(self, path: str) -> tuple[int, Any]:
        """What a registry says to a path."""
        if path == "/schemas/types":
            return 200, ["JSON", "PROTOBUF", "AVRO"]
        if found := re.fullmatch(r"/schemas/ids/(\d+)", path):
            schema = self._schemas.get(int(found[1]))
            return (404, {"error_code": 40403, "message": "Schema not found"}) if schema is None else (200, schema)
        if found := re.fullmatch(r"/subjects/([^/]+)/versions/(latest|\d+)", path):
            numbers = self._subjects.get(found[1])
            if numbers is None:
                return 404, {"error_code": 40401, "message": f"Subject '{found[1]}' not found."}
            version = len(numbers) if found[2] == "latest" else int(found[2])
            number = numbers[version - 1]
            return 200, {"subject": found[1], "version": version, "id": number, **self._schemas[number]}
        return 404, "not found"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            log_message: Callable[..., None] = lambda *_: None

            def do_GET(self) -> None:
                registry.asked.append(self.path)
                status, body = registry.answer(self.path)
                if registry.status is not None:
                    status, body = registry.status, {"error_code": registry.status * 100, "message": "as told"}
                wanted = registry.login
                if wanted is not None:
                    given = self.headers.get("Authorization", "")
                    if given != f"Basic {base64.b64encode(wanted.encode()).decode()}":
                        status, body = 401, {"error_code": 401, "message": "Unauthorized"}
                payload = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
                self.send_header("Content-Length", str(len(payload)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(payload)
                self.close_connection = True

        return Handler

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
