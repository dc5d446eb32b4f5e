"""How the stream's clients log in to the broker: one set of settings, for librdkafka and for Faust's aiokafka.

Certificates are always verified, and so is that they are for the host that was asked for.
"""

from __future__ import annotations

import ipaddress
import logging
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from aiokafka import conn
from aiokafka.protocol.admin import SaslAuthenticateRequest
from faust.auth import OAuthCredentials, SASLCredentials, SSLCredentials
from pydantic import Field, SecretStr, ValidationInfo, field_validator

from headrace.settings import PREFIX, Settings
from streaming.tokens import TokenSource

Protocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]

_TLS = ("tls_ca_file", "tls_certificate_file", "tls_key_file", "tls_key_password")
_LOGIN = ("sasl_username", "sasl_password")
_TOKEN = ("oauth_token_url", "oauth_client_id", "oauth_client_secret", "oauth_scope", "oauth_ca_file")
_REQUIRED = {*_LOGIN, "oauth_token_url", "oauth_client_id", "oauth_client_secret"}


class SecuritySettings(Settings):
    """What a client needs to log in to the broker; `docs/how-to/security.md` has an example for each mechanism.

    What the chosen protocol and mechanism would not use is refused, as is what they lack: a password beside a forgotten
    protocol would otherwise be a connection that never comes about.

    Attributes:
        security_protocol: as the broker's listener has it.
        sasl_mechanism: how to log in, with a protocol that begins with SASL.
        sasl_username, sasl_password: for PLAIN and SCRAM.
        tls_ca_file: PEM, who may have signed the broker's certificate; the system's own authorities without it.
        tls_certificate_file, tls_key_file, tls_key_password: PEM, the client's own certificate (mTLS).
        oauth_token_url, oauth_client_id, oauth_client_secret, oauth_scope: for OAUTHBEARER, where a token is had (by
            the grant of client credentials).
        oauth_ca_file: as `tls_ca_file`, for the token endpoint.
    """

    security_protocol: Protocol = "PLAINTEXT"
    sasl_mechanism: Mechanism = "SCRAM-SHA-512"
    sasl_username: str | None = Field(default=None, min_length=1)
    sasl_password: SecretStr | None = Field(default=None, min_length=1)
    tls_ca_file: Path | None = None
    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None
    tls_key_password: SecretStr | None = None
    oauth_token_url: str | None = None
    oauth_client_id: str | None = Field(default=None, min_length=1)
    oauth_client_secret: SecretStr | None = Field(default=None, min_length=1)
    oauth_scope: str | None = None
    oauth_ca_file: Path | None = None

    @property
    def uses_tls(self) -> bool:
        """Whether the connection to the broker is encrypted."""
        return self.security_protocol.endswith("SSL")

    @property
    def uses_token(self) -> bool:
        """Whether the clients log in by a token."""
        return self.security_protocol.startswith("SASL") and self.sasl_mechanism == "OAUTHBEARER"

    @field_validator(*_TLS, *_LOGIN, *_TOKEN)
    @classmethod
    def _is_wanted(cls, value: Any, info: ValidationInfo) -> Any:
        """Check that a setting is there if, and only if, protocol and mechanism use it."""
        name, protocol, mechanism = str(info.field_name), *map(info.data.get, ("security_protocol", "sasl_mechanism"))
        if protocol is None or mechanism is None:
            return value  # wrong themselves, and told so
        used: set[str] = set(_TLS) if protocol.endswith("SSL") else set()
        chosen = f"{PREFIX}SECURITY_PROTOCOL={protocol}"
        if protocol.startswith("SASL"):
            used |= set(_TOKEN if mechanism == "OAUTHBEARER" else _LOGIN)
            chosen += f" with {PREFIX}SASL_MECHANISM={mechanism}"
        if value is None and name in used & _REQUIRED:
            msg = f"is not set, and {chosen} needs it"
            raise ValueError(msg)
        if value is not None and name not in used:
            msg = f"is set, but {chosen} does not use it; choose what does, or take it out"
            raise ValueError(msg)
        return value

    @field_validator("tls_ca_file", "oauth_ca_file")
    @classmethod
    def _has_certificates(cls, file: Path | None) -> Path | None:
        """Check that certificates can be read from a file of authorities."""
        if file is not None:
            _open(file)
            try:
                ssl.create_default_context(cafile=file)
            except ssl.SSLError:
                msg = f"{file} holds no certificate in PEM form"
                raise ValueError(msg) from None
        return file

    @field_validator("tls_certificate_file", "tls_key_file")
    @classmethod
    def _is_there(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        """Check that a file can be read, and that certificate and key come together."""
        other, name = info.data.get("tls_certificate_file"), f"{PREFIX}TLS_CERTIFICATE_FILE"
        if (
            info.field_name == "tls_key_file"
            and (file is None) != (other is None)
            and "tls_certificate_file" in info.data
        ):
            msg = f"is not set, but {name} is; set both" if file is None else f"is set, but {name} is not; set both"
            raise ValueError(msg)
        if file is not None:
            _open(file)
        return file

    @field_validator("tls_key_password")
    @classmethod
    def _opens_the_key(cls, password: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        """Check that the certificate, the key and its password belong together."""
        certificate, key = info.data.get("tls_certificate_file"), info.data.get("tls_key_file")
        if password is not None and key is None and "tls_key_file" in info.data:
            msg = f"is set, but {PREFIX}TLS_KEY_FILE is not"
            raise ValueError(msg)
        if certificate is not None and key is not None:
            _load_certificate(ssl.create_default_context(), certificate, key, password)
        return password

    @field_validator("oauth_token_url")
    @classmethod
    def _is_endpoint(cls, url: str | None) -> str | None:
        """Check that the endpoint is a plain URL: what else it held would be seen in errors."""
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in {"https", "http"} or not parts.hostname or parts.username or parts.password:
                msg = "expected a URL such as https://login.example.com/oauth2/token, without a user name or password"
                raise ValueError(msg)
        return url


def _open(file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        msg = f"{file} cannot be read: {error.strerror}"
        raise ValueError(msg) from None


def _load_certificate(context: ssl.SSLContext, certificate: Path, key: Path, password: SecretStr | None) -> None:
    """Load a certificate and its key.

    Raises:
        ValueError: they do not belong together, or the key cannot be opened.
    """
    given = "" if password is None else password.get_secret_value()
    try:
        # A function, because OpenSSL asks at the terminal where it is given nothing.
        context.load_cert_chain(certificate, key, lambda: given)
    except (ssl.SSLError, ValueError) as error:
        why = getattr(error, "reason", None) or "the password is missing or too long"
        msg = (
            f"certificate {certificate} and key {key} cannot be loaded ({why}); expected PEM, the key of that very "
            f"certificate, and its password in {PREFIX}TLS_KEY_PASSWORD if it has one"
        )
        raise ValueError(msg) from None


def librdkafka_settings(settings: SecuritySettings) -> dict[str, Any]:
    """How a librdkafka client logs in. Holds the secrets: never log it."""
    values: dict[str, Any] = {"security.protocol": settings.security_protocol}
    if settings.uses_tls:
        values |= {
            "ssl.endpoint.identification.algorithm": "https",
            "ssl.ca.location": settings.tls_ca_file,
            "ssl.certificate.location": settings.tls_certificate_file,
            "ssl.key.location": settings.tls_key_file,
            "ssl.key.password": settings.tls_key_password,
        }
    if settings.security_protocol.startswith("SASL"):
        values["sasl.mechanism"] = settings.sasl_mechanism
        if settings.uses_token:
            values |= {
                "sasl.oauthbearer.method": "oidc",
                "sasl.oauthbearer.token.endpoint.url": settings.oauth_token_url,
                "sasl.oauthbearer.client.id": settings.oauth_client_id,
                "sasl.oauthbearer.client.secret": settings.oauth_client_secret,
                "sasl.oauthbearer.scope": settings.oauth_scope,
                "https.ca.location": settings.oauth_ca_file,
            }
        else:
            values |= {"sasl.username": settings.sasl_username, "sasl.password": settings.sasl_password}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def faust_credentials(settings: SecuritySettings, timeout_s: float) -> Any:
    """How Faust's clients log in; None without any security. Holds the secrets, and does not show them.

    Args:
        timeout_s: how long a token may take to come.
    """
    context = None
    if settings.uses_tls:
        context = ssl.create_default_context(cafile=settings.tls_ca_file)
        if settings.tls_certificate_file is not None and settings.tls_key_file is not None:
            _load_certificate(context, settings.tls_certificate_file, settings.tls_key_file, settings.tls_key_password)
    if settings.uses_token:
        return OAuthCredentials(oauth_cb=token_source(settings, timeout_s), ssl_context=context)
    if settings.security_protocol.startswith("SASL"):
        return SASLCredentials(
            username=settings.sasl_username,
            password=_plain(settings.sasl_password),
            mechanism=settings.sasl_mechanism,
            ssl_context=context,
        )
    return None if context is None else SSLCredentials(context)


def token_source(settings: SecuritySettings, timeout_s: float) -> TokenSource:
    """Where tokens come from, of settings that use them."""
    return TokenSource(
        str(settings.oauth_token_url),
        str(settings.oauth_client_id),
        settings.oauth_client_secret or SecretStr(""),
        scope=settings.oauth_scope,
        ca_file=settings.oauth_ca_file,
        timeout_s=timeout_s,
    )


def warnings(settings: SecuritySettings, servers: Iterable[str]) -> list[str]:
    """What an operator should know of settings that are valid: secrets that pass a network in the clear."""
    found = []
    far = [server for server in servers if not is_loopback(server.rpartition(":")[0])]
    if settings.security_protocol == "SASL_PLAINTEXT" and far:
        what = {"PLAIN": "the password passes", "OAUTHBEARER": "the token passes"}.get(
            settings.sasl_mechanism, "events, and what the password can be guessed from, pass"
        )
        found.append(
            f"{PREFIX}SECURITY_PROTOCOL=SASL_PLAINTEXT: {what} the network to {', '.join(far)} unencrypted; "
            "use a listener with SASL_SSL"
        )
    if settings.uses_token:
        url = urlsplit(str(settings.oauth_token_url))
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            found.append(
                f"{PREFIX}OAUTH_TOKEN_URL: the client secret passes the network to {url.hostname} unencrypted; "
                "use https"
            )
    return found


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or address alone."""
    bare = host.strip("[]")
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare == "localhost"


class _LoginFilter(logging.Filter):
    """Lets pass what aiokafka logs of its requests at debug level, but for those that hold a password or a token."""

    def filter(self, record: logging.LogRecord) -> bool:
        arguments = record.args.values() if isinstance(record.args, Mapping) else record.args or ()
        return not any(getattr(one, "API_KEY", None) == SaslAuthenticateRequest.API_KEY for one in arguments)


def keep_logins_out_of_logs() -> None:
    """Whatever the log level: aiokafka writes each request out at debug level, the one with the password too."""
    logger = logging.getLogger(conn.__name__)
    if not any(isinstance(one, _LoginFilter) for one in logger.filters):
        logger.addFilter(_LoginFilter())


def _plain(value: object) -> Any:
    """A setting as a client wants it."""
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)
