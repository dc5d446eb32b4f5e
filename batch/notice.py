"""Tell a webhook of a failure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from urllib.parse import urlsplit

import requests

logger = logging.getLogger("luigi-interface")
# It logs the path of every request, which is a webhook's password.
logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)

TIMEOUT_S = 5.0


def post(url: str, notice: Mapping[str, str | int | None]) -> None:
    """POST a notice as JSON. What goes wrong is logged, without the URL beyond its host, and never raised."""
    try:
        # A redirect would turn it into a GET. The answer's body is not wanted, so it is not waited for.
        with requests.post(url, json=notice, timeout=TIMEOUT_S, allow_redirects=False, stream=True) as answer:
            found = None if 200 <= answer.status_code < 300 else f"HTTP {answer.status_code}"
    except (requests.RequestException, OSError, ValueError) as error:
        found = type(error).__name__  # its text has the URL
    if found is not None:
        logger.warning("no notice of the failure reached the webhook at %s: %s", urlsplit(url).hostname, found)
