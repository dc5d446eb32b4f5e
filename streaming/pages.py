"""The status page: `GET /`, the same as `/status.json`, and the page's own style, script and sign.

One document is made at most once in a second, whatever the number of viewers, and not on the event loop. Read only, no
cookies, nothing from outside; texts of events and names are escaped, those of them that show nothing or turn the
direction of writing, too. What is served shows records, so a page elsewhere whose name was made to lead here (DNS
rebinding) is refused.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from importlib.resources import files
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import faust
import jinja2
from faust.web.views import View as WebView
from markupsafe import Markup

from streaming.chart import HEIGHT, WIDTH, chart
from streaming.status import AUDIT, GATE, Board, Json, seconds_text

EVERY_S = 1.0
"""How old what is served may be."""

FIRST_ANSWERS_S = 1.0
"""So long a page waits for what is being looked up."""

MOST_PARTITIONS = 400
"""So many the page lists; of more only those of each view that are furthest behind. `/status.json` has all."""

FURTHEST = 10

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

ASSETS = {"status.css": "text/css", "status.js": "text/javascript", "status.svg": "image/svg+xml"}


class StatusPages:
    """What is served, made anew when it is asked for and too old. Of the event loop."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._pool = ThreadPoolExecutor(1, "headrace-status")
        self._lock: asyncio.Lock | None = None
        self._made_s = -EVERY_S
        self._page, self._json = b"", b""

    async def page(self) -> bytes:
        """The page."""
        await self._make()
        return self._page

    async def json(self) -> bytes:
        """The document."""
        await self._make()
        return self._json

    async def _make(self) -> None:
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            if time.monotonic() - self._made_s < EVERY_S:
                return
            for look_up in self._board.look_ups:
                look_up.refresh()
            deadline = time.monotonic() + FIRST_ANSWERS_S
            while any(one.is_awaited for one in self._board.look_ups) and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            moment = self._board.moment()
            loop = asyncio.get_running_loop()
            self._page, self._json = await loop.run_in_executor(
                self._pool, lambda: render(self._board.document(moment))
            )
            self._made_s = time.monotonic()


def add_status_pages(app: faust.App, board: Board) -> None:
    """Serve the status page of a Faust app."""
    pages = StatusPages(board)

    @app.page("/")
    async def page(self: WebView, request: Any) -> Any:
        if not await asyncio.to_thread(is_own_name, request.host):
            return _refusal(self, request.host)
        return self.bytes(await pages.page(), content_type="text/html", headers=dict(HEADERS))

    @app.page("/status.json")
    async def document(self: WebView, request: Any) -> Any:
        if not await asyncio.to_thread(is_own_name, request.host):
            return _refusal(self, request.host)
        return self.bytes(await pages.json(), content_type="application/json", headers=dict(HEADERS))

    for name, kind in ASSETS.items():
        _add_asset(app, name, kind)


def _add_asset(app: faust.App, name: str, kind: str) -> None:
    content = files("streaming").joinpath(name).read_bytes()

    @app.page(f"/{name}", name=name)
    async def asset(self: WebView, request: Any) -> Any:
        return self.bytes(content, content_type=kind, headers={**HEADERS, "Cache-Control": "no-cache"})


def is_own_name(host: str) -> bool:
    """Whether a `Host` header is one that no stranger's DNS can have led here.

    Any IP address is, a name without a dot, and the machine's own name.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    with suppress(ValueError):
        ip_address(name)
        return True
    name = name.removesuffix(".")
    return "." not in name or name in _names()


def _refusal(view: WebView, host: str) -> Any:
    text = (
        f"The status page is for those who ask for it by an IP address or as {' or '.join(sorted(_names()))}, "
        f"and not for {visible(host)}.\nA proxy that stands before it asks by the worker's address: in Caddy "
        "`header_up Host {upstream_hostport}`; nginx does so unless told otherwise.\n"
    )
    return view.text(text, status=421, headers=dict(HEADERS))


@lru_cache
def _names() -> frozenset[str]:
    """The names of this machine, in lower case. Looking them up may take a while, so once."""
    return frozenset({"localhost", socket.gethostname().lower(), socket.getfqdn().lower()})


def render(document: Json) -> tuple[bytes, bytes]:
    """The document as a page and as JSON."""
    page = _template().render(s=document, partitions=_listed(document["partitions"]["values"]), **WORDS)
    return page.encode("utf-8", "replace"), json.dumps(document, allow_nan=False).encode()


def visible(value: Any) -> Any:
    """A text with every character that shows nothing, or turns the direction of writing, as its escape."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in value)


def _listed(rows: list[Json]) -> dict[str, list[Json]]:
    """The partitions to show, by view: all if they are not many, else those furthest behind."""
    by_view: dict[str, list[Json]] = {}
    for row in rows:
        by_view.setdefault(row["view"], []).append(row)
    if len(rows) <= MOST_PARTITIONS:
        return by_view
    return {view: sorted(own, key=_urgency)[:FURTHEST] for view, own in by_view.items()}


def _urgency(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Not known first, then by the lag, the largest first."""
    return row["lag"] is not None, -(row["lag"] or 0)


def _number(value: float | None) -> str:
    """A count; of less than ten with its fraction."""
    if value is None:
        return ""
    return f"{value:,.1f}" if value != int(value) and value < 10 else f"{value:,.0f}"


def _clock(time_text: str | None) -> str:
    """A time of the document, with its day only where that is not the worker's today."""
    if time_text is None:
        return ""
    moment = datetime.fromisoformat(time_text)
    is_today = moment.date() == datetime.now(moment.tzinfo).date()
    return f"{moment:%H:%M:%S}" if is_today else f"{moment:%Y-%m-%d %H:%M}"


WORDS: dict[str, Any] = {
    "chart": chart,
    "chart_width": WIDTH,
    "chart_height": HEIGHT,
    "seconds": seconds_text,
    "number": _number,
    "clock": _clock,
    "gate": GATE,
    "audit": AUDIT,
}


@lru_cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("streaming", "."),
        autoescape=True,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("status.html.j2")
