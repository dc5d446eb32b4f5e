"""Chromium without a window, told what to do by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from tests.servers.process import Server, ServerError, UnavailableError

WAIT_S = 20.0


class Browser(Server):
    """Use it from one thread."""

    name = "browser"

    def __init__(self, width: int = 1280, height: int = 800) -> None:
        super().__init__()
        self._size = f"{width},{height}"
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._seen: list[str] = []

    def command(self) -> list[str]:
        """Chromium on a port that it chooses."""
        found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if found is None:
            raise UnavailableError("no chromium; install it (Debian: apt-get install chromium)")
        options = ["--headless=new", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        if os.getuid() == 0:
            options.append("--no-sandbox")
        folder = ["--remote-debugging-port=0", f"--user-data-dir={self.folder}"]
        return [found, *options, f"--window-size={self._size}", *folder, "about:blank"]

    def is_ready(self) -> bool:
        """Whether it has a tab."""
        with suppress(OSError, aiohttp.ClientError, IndexError):
            return bool(self._tabs())
        return False

    def close(self) -> None:
        """End it, and remove its profile."""
        super().close()
        self._loop.close()

    def open(self, url: str) -> None:
        """Go to a page in the first tab."""
        self.tell("Page.navigate", {"url": url})

    def evaluate(self, script: str, tab: int = 0) -> Any:
        """The value of JavaScript in a tab; tabs are counted in the order in which they were opened."""
        answer = self.tell("Runtime.evaluate", {"expression": script, "returnByValue": True}, tab)
        return answer["result"].get("value")

    def wait(self, script: str, tab: int = 0) -> Any:
        """The value of JavaScript once it is true."""
        deadline = time.monotonic() + WAIT_S
        while True:
            with suppress(ServerError):  # the page is on its way to another
                if found := self.evaluate(script, tab):
                    return found
            if time.monotonic() > deadline:
                raise ServerError(f"the browser: waited {WAIT_S:.0f} s in vain for {script}")
            time.sleep(0.1)

    def click(self, script: str) -> None:
        """Click the middle of an element, as a person does."""
        box = self.wait(
            f"(e => {{ if (!e) return null; e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f" return b.width ? [b.x + b.width / 2, b.y + b.height / 2] : null }})({script})"
        )
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
            self.tell("Input.dispatchMouseEvent", {"type": kind, **where})

    def tabs(self) -> list[str]:
        """The addresses of the tabs, in the order in which they were opened."""
        return [tab["url"] for tab in self._tabs()]

    def screenshot(self, path: Path, tab: int = 0) -> None:
        """What a tab shows, as PNG."""
        path.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot", {"format": "png"}, tab)["data"]))

    def tell(self, method: str, parameters: dict[str, Any], tab: int = 0) -> Any:
        """One command of the protocol, and its result."""
        return self._loop.run_until_complete(self._tell(self._tabs()[tab], method, parameters))

    async def _tell(self, tab: dict[str, Any], method: str, parameters: dict[str, Any]) -> Any:
        number = next(self._numbers)
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket,
        ):
            await socket.send_json({"id": number, "method": method, "params": parameters})
            answer: dict[str, Any] = {}
            while answer.get("id") != number:
                answer = await socket.receive_json(timeout=WAIT_S)
        if "error" in answer:
            raise ServerError(f"{method}: {answer['error']}")
        return answer["result"]

    def _tabs(self) -> list[dict[str, Any]]:
        """The tabs as Chromium tells of them, in the order in which they were first seen."""
        port = (self.folder / "DevToolsActivePort").read_text(encoding="utf-8").split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=WAIT_S) as answer:
            found = {tab["id"]: tab for tab in json.load(answer) if tab["type"] == "page"}
        self._seen = [tab for tab in self._seen if tab in found] + [tab for tab in found if tab not in self._seen]
        return [found[tab] for tab in self._seen]
