"""A schema registry, asked over its REST API: the schemas that the records of a topic name by number.

Source: https://docs.confluent.io/platform/current/schema-registry/develop/api.html, which others speak too.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from requests.auth import HTTPBasicAuth

from headrace.errors import TransientError

MAGIC = 0
PREFIX_BYTES = 5
"""A framed record begins with the magic byte 0 and the schema's id, four bytes, big-endian."""

_NO_SCHEMA, _NO_SUBJECT, _NO_VERSION = 40403, 40401, 40402
_MOST_REFERENCES = 100

_ADVICE = "check that it runs, and HEADRACE_SCHEMA_REGISTRY_URL"
_TLS_ADVICE = (
    "check HEADRACE_SCHEMA_REGISTRY_CA_FILE, and that its certificate names the host of HEADRACE_SCHEMA_REGISTRY_URL"
)


class RegistryError(TransientError):
    """The registry did not answer, or answered that it cannot now."""


class UnknownSchemaError(Exception):
    """The registry says that it has no such schema."""


@dataclass(frozen=True)
class Registered:
    """A schema as registered.

    Attributes:
        kind: `AVRO`, `PROTOBUF` or `JSON`.
        references: the texts of the schemas that it needs, each after those that it needs itself.
    """

    id: int
    kind: str
    text: str
    references: tuple[str, ...]


class SchemaRegistry:
    """The registry. Blocking; one thread at a time. Every call ends within about the timeout, or raises.

    Args:
        url: where its API begins.
        ca_file: the authorities that sign its certificate; None are the system's.
    """

    def __init__(
        self,
        url: str,
        *,
        username: str | None = None,
        password: str | None = None,
        ca_file: Path | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.headers["Accept"] = "application/vnd.schemaregistry.v1+json, application/json"
        if username is not None:
            self._session.auth = HTTPBasicAuth(username.encode(), (password or "").encode())
        self._authorities = _system_authorities() if ca_file is None else str(ca_file)

    def check(self) -> None:
        """Look whether it answers.

        Raises:
            RegistryError: it does not, or turns the login away.
        """
        self._get("/schemas/types")

    def schema(self, schema_id: int) -> Registered:
        """The schema of an id.

        Raises:
            UnknownSchemaError: the registry has none of that id.
            RegistryError: see `check`.
        """
        return self._registered(schema_id, self._get(f"/schemas/ids/{schema_id}"))

    def latest(self, subject: str) -> Registered:
        """The latest schema of a subject. Raises as `schema` does."""
        answer = self._get(f"/subjects/{quote(subject, safe='')}/versions/latest")
        if not isinstance(answer.get("id"), int):
            msg = f"schema registry {self.url}: the latest schema of {subject} has no id"
            raise RegistryError(msg)
        return self._registered(answer["id"], answer)

    def _registered(self, schema_id: int, answer: dict[str, Any]) -> Registered:
        found: dict[tuple[str, int], str] = {}
        try:
            self._collect(answer.get("references") or (), found, ())
        except (KeyError, TypeError, ValueError) as error:
            msg = f"schema registry {self.url}: the references of schema {schema_id} cannot be read"
            raise RegistryError(msg) from error
        return Registered(
            schema_id, str(answer.get("schemaType") or "AVRO"), str(answer["schema"]), tuple(found.values())
        )

    def _collect(self, references: Any, found: dict[tuple[str, int], str], above: tuple[tuple[str, int], ...]) -> None:
        """The texts of references, deepest first."""
        for reference in references:
            key = (str(reference["subject"]), int(reference["version"]))
            if key in found or key in above:
                continue
            if len(found) + len(above) >= _MOST_REFERENCES:
                msg = f"schema registry {self.url}: a schema with more than {_MOST_REFERENCES} references"
                raise UnknownSchemaError(msg)
            answer = self._get(f"/subjects/{quote(key[0], safe='')}/versions/{key[1]}")
            self._collect(answer.get("references") or (), found, (*above, key))
            found[key] = str(answer["schema"])

    def _get(self, path: str) -> dict[str, Any]:
        where = f"schema registry {self.url}{path}"
        try:
            # Not as the session's `verify`: variables such as REQUESTS_CA_BUNDLE would replace that.
            answer = self._session.get(self.url + path, timeout=self._timeout_s, verify=self._authorities)
            status = answer.status_code
            body = answer.json() if status in (200, 404) else None
        except (requests.RequestException, ValueError) as error:
            msg = f"{where}: {type(error).__name__}: {error}"
            is_tls = isinstance(error, requests.exceptions.SSLError)
            raise RegistryError(f"{msg[:500]}; {_TLS_ADVICE if is_tls else _ADVICE}") from error
        if status == 200 and path == "/schemas/types":
            return {}
        if status == 200 and isinstance(body, dict) and isinstance(body.get("schema"), str):
            return body
        # A 404 without the registry's own code is of a proxy, or of a wrong address: it says nothing of the schema.
        if (
            status == 404
            and isinstance(body, dict)
            and body.get("error_code") in (_NO_SCHEMA, _NO_SUBJECT, _NO_VERSION)
        ):
            raise UnknownSchemaError(f"{where}: it has none")
        if status in (401, 403):
            msg = (
                f"{where}: it turns the login away (HTTP {status}); correct HEADRACE_SCHEMA_REGISTRY_USERNAME and "
                "HEADRACE_SCHEMA_REGISTRY_PASSWORD"
            )
            raise RegistryError(msg)
        msg = f"{where}: HTTP {status}, which is no answer of a schema registry; see HEADRACE_SCHEMA_REGISTRY_URL"
        raise RegistryError(msg)


def _system_authorities() -> str | bool:
    """The file or folder of the system's own authorities; `requests` brings others, and takes those by itself."""
    system = ssl.get_default_verify_paths()
    return system.cafile or system.capath or True
