"""Tokens for OAUTHBEARER, by OAuth's grant of client credentials. librdkafka has its own; this one is for aiokafka.

Source: RFC 6749, sections 4.4 and 5. As librdkafka does, it names the client by HTTP Basic without percent-encoding.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import KafkaConnectionError
from pydantic import SecretStr

from headrace.errors import TransientError

_RENEWED_AT = 0.8
"""The share of a token's life after which the next one is fetched."""

_MARGIN_S = 5.0
"""A token is not used so shortly before its end: it has to reach the broker."""

_LONGEST_ANSWER_BYTES = 1 << 20


class TokenError(TransientError, KafkaConnectionError):  # type: ignore[misc] # aiokafka has no types
    """No token was had. To aiokafka it is a connection that was not made: it tries again."""


class TokenSource(AbstractTokenProvider):  # type: ignore[misc] # aiokafka has no types
    """Gives a valid token, fetched when it is first asked for and anew before it ends. Of any event loop.

    Args:
        timeout_s: how long a fetch may take in all.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        client_secret: SecretStr,
        *,
        scope: str | None,
        ca_file: Path | None,
        timeout_s: float,
    ) -> None:
        self._url, self._client_id, self._client_secret = url, client_id, client_secret
        self._scope = scope
        self._tls = ssl.create_default_context(cafile=ca_file)
        self._timeout_s = timeout_s
        self._held: tuple[str, float, float] = ("", 0.0, 0.0)  # the token, until when it is fresh, until when valid

    async def token(self) -> str:
        """A token that is valid now.

        Raises:
            TokenError: the endpoint gave none, and the last one is about to end.
        """
        token, fresh_until_s, valid_until_s = self._held
        asked_s = time.monotonic()
        if asked_s < fresh_until_s:
            return token
        try:
            token, life_s = _read(await self._ask())
        except TokenError:
            if time.monotonic() < valid_until_s:
                return token
            raise
        self._held = (token, asked_s + life_s * _RENEWED_AT, asked_s + life_s - _MARGIN_S)
        return token

    def fetch(self) -> None:
        """Fetch a token, to learn whether that works. Blocking, bounded; not from an event loop.

        Raises:
            TokenError: it does not.
        """
        asyncio.run(self.token())

    async def _ask(self) -> bytes:
        """What the endpoint answers."""
        where = f"the token endpoint {_bare(self._url)}"
        form = {"grant_type": "client_credentials"} | ({"scope": self._scope} if self._scope else {})
        login = f"{self._client_id}:{self._client_secret.get_secret_value()}".encode()
        headers = {"Authorization": f"Basic {base64.b64encode(login).decode()}", "Accept": "application/json"}
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, trust_env=True) as session,
                # No redirect: it would carry the secret elsewhere.
                session.post(self._url, data=form, headers=headers, ssl=self._tls, allow_redirects=False) as answer,
            ):
                body = await answer.content.read(_LONGEST_ANSWER_BYTES)
        except TimeoutError as error:
            msg = f"{where} did not answer within {self._timeout_s:g} s; check HEADRACE_OAUTH_TOKEN_URL"
            raise TokenError(msg) from error
        except (aiohttp.ClientError, OSError) as error:
            msg = f"{where} was not reached ({error}); check HEADRACE_OAUTH_TOKEN_URL and HEADRACE_OAUTH_CA_FILE"
            raise TokenError(msg) from error
        if answer.status != 200:
            msg = (
                f"{where} answered {answer.status}{_said(body)}; check HEADRACE_OAUTH_TOKEN_URL, "
                "HEADRACE_OAUTH_CLIENT_ID, HEADRACE_OAUTH_CLIENT_SECRET and HEADRACE_OAUTH_SCOPE"
            )
            raise TokenError(msg)
        return body


def _read(body: bytes) -> tuple[str, float]:
    """The token and its life in seconds; 0 where the answer does not say, and then the token is used once."""
    found = _json(body)
    token, life = found.get("access_token"), found.get("expires_in", 0)
    if not isinstance(token, str) or not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        msg = "the token endpoint answered 200 without an `access_token`; check HEADRACE_OAUTH_TOKEN_URL"
        raise TokenError(msg)
    try:
        return token, float(life)
    except (TypeError, ValueError):
        return token, 0.0


def _said(body: bytes) -> str:
    """The error code of an answer, if it is one; no other text of it, for who knows what it repeats."""
    code = _json(body).get("error")
    return f" ({code})" if isinstance(code, str) and re.fullmatch(r"[a-z_]{1,60}", code) else ""


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _bare(url: str) -> str:
    """Without its query."""
    return urlsplit(url)._replace(query="", fragment="").geturl()
