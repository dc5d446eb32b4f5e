"""Chromium without a window, driven by Playwright; what goes wrong in a page is noted."""

from __future__ import annotations

import ipaddress
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser as Chromium
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Playwright, Request, Route, sync_playwright

from tests.servers.process import Startable, UnavailableError

WAIT_MS = 20_000


class Browser(Startable):
    """Debian's own Chromium. Use it from one thread, in which nobody else may run an event loop meanwhile.

    Attributes:
        problems: what pages complained of (errors of scripts and of the console, among them what a policy refused), and
            what they asked for beyond this machine, which they do not get.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._playwright: Playwright | None = None
        self._chromium: Chromium | None = None

    def start(self) -> Self:
        """Start it."""
        found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if found is None:
            raise UnavailableError("no chromium; install it (Debian: apt-get install chromium)")
        self._playwright = sync_playwright().start()
        self._chromium = self._playwright.chromium.launch(
            executable_path=found, chromium_sandbox=os.getuid() != 0, args=["--disable-dev-shm-usage"]
        )
        return self

    def close(self) -> None:
        """End it."""
        if self._chromium is not None:
            self._chromium.close()
        if self._playwright is not None:
            self._playwright.stop()

    def page(self, *, width: int = 1280, height: int = 800, **options: Any) -> Page:
        """A new window with a profile of its own; options are those of Playwright's `new_context`."""
        assert self._chromium is not None
        context: BrowserContext = self._chromium.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(WAIT_MS)
        context.route(lambda url: not _is_here(url), self._refuse)
        context.on("console", self._hear)
        context.on("weberror", lambda error: self.problems.append(f"error of a script: {error.error}"))
        return context.new_page()

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type} in the console: {message.text}")

    def _refuse(self, route: Route, request: Request) -> None:
        self.problems.append(f"asked for beyond this machine: {request.url}")
        route.abort()


def inaccessible(page: Page) -> list[str]:
    """What axe finds wrong with a page as it is now, and holds to be serious or critical: rule and elements."""
    found: Sequence[dict[str, Any]] = Axe().run(page).response["violations"]
    return [
        f"{rule['id']} ({rule['impact']}): {rule['help']}: {[node['html'][:120] for node in rule['nodes'][:5]]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]


def screenshot(page: Page, path: Path) -> None:
    """What a page shows from top to end, as PNG."""
    page.screenshot(path=path, full_page=True, animations="disabled")


def _is_here(url: str) -> bool:
    """Whether an address is of this machine, or of none."""
    host = urlsplit(url).hostname
    if host in (None, "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False
