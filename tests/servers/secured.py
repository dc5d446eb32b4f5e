"""A Kafka that asks who is there: every way to log in, on one broker, with access lists."""

from __future__ import annotations

from collections.abc import Mapping

from tests.servers.brokers import Kafka
from tests.servers.certificates import Authority, Certificate
from tests.servers.tokens import AUDIENCE, ISSUER, TokenServer

_MODULES = {
    "scram-sha-256": "org.apache.kafka.common.security.scram.ScramLoginModule",
    "scram-sha-512": "org.apache.kafka.common.security.scram.ScramLoginModule",
    "plain": "org.apache.kafka.common.security.plain.PlainLoginModule",
    "oauthbearer": "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule",
}
_SASL_LISTENERS = ("SASL_TLS", "SASL_CLEAR", "SASL_OTHER")


def secured_kafka(authority: Authority, tokens: TokenServer, users: Mapping[str, str], *, other: Certificate) -> Kafka:
    """A broker with the listeners `SASL_TLS`, `SASL_CLEAR` (any mechanism) and `MTLS` beside the plain one.

    Who comes by the plain listener may do everything, whoever else comes what an access list allows.

    Args:
        users: passwords by user, for PLAIN and SCRAM.
        other: the certificate of one more listener, `SASL_OTHER`.
    """
    own = authority.sign("broker", hosts=("IP:127.0.0.1", "DNS:localhost")).joined()
    config = {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(own),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(authority.file),
        "listener.name.mtls.ssl.client.auth": "required",
        "listener.name.sasl_other.ssl.keystore.location": str(other.joined()),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "sasl.oauthbearer.jwks.endpoint.url": tokens.keys.as_uri(),
        "sasl.oauthbearer.expected.audience": AUDIENCE,
        "sasl.oauthbearer.expected.issuer": ISSUER,
    }
    entries = " ".join(f'user_{name}="{password}"' for name, password in users.items())
    for listener in _SASL_LISTENERS:
        prefix = f"listener.name.{listener.lower()}"
        config[f"{prefix}.sasl.enabled.mechanisms"] = ",".join(_MODULES).upper()
        for mechanism, module in _MODULES.items():
            known = entries if mechanism == "plain" else ""
            config[f"{prefix}.{mechanism}.sasl.jaas.config"] = f"{module} required {known};"
        config[f"{prefix}.oauthbearer.sasl.server.callback.handler.class"] = (
            "org.apache.kafka.common.security.oauthbearer.OAuthBearerValidatorCallbackHandler"
        )
        config[f"{prefix}.oauthbearer.connections.max.reauth.ms"] = "3600000"  # no longer than the token
    return Kafka(
        config=config,
        listeners={"SASL_TLS": "SASL_SSL", "SASL_CLEAR": "SASL_PLAINTEXT", "SASL_OTHER": "SASL_SSL", "MTLS": "SSL"},
        scram=users,
        java=(f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={tokens.keys.as_uri()}",),
    )
