"""Luigi's scheduler, and what serves the reports that its pages link."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.servers.process import Server, UnavailableError, free_port, is_listening
from tests.servers.repository import ROOT


class Luigid(Server):
    """A `luigid` with the settings of the project's `luigi.cfg`."""

    name = "luigid"

    def __init__(self) -> None:
        super().__init__()
        self.port = free_port()

    @property
    def url(self) -> str:
        """Where its pages are."""
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """As it is documented, its state in a folder of its own."""
        program = str(Path(sys.executable).with_name("luigid"))
        state = str(self.folder / "state.pickle")
        return [program, "--address", "127.0.0.1", "--port", str(self.port), "--state-path", state]

    def environment(self) -> dict[str, str]:
        """The settings."""
        return {"LUIGI_CONFIG_PATH": str(ROOT / "luigi.cfg")}

    def is_ready(self) -> bool:
        """Whether it listens."""
        return is_listening(self.port)


class Reports(Server):
    """Caddy with the project's Caddyfile.

    Args:
        batch: the batch folder.
    """

    name = "reports"

    def __init__(self, batch: Path) -> None:
        super().__init__()
        self._batch = batch
        self.port = free_port()

    @property
    def url(self) -> str:
        """Where the batch folder is."""
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """As the service does, on another port."""
        caddy = shutil.which("caddy")
        if caddy is None:
            raise UnavailableError("no caddy; install it (Debian: apt-get install caddy)")
        file = self.folder / "Caddyfile"
        text = (ROOT / "deploy" / "Caddyfile").read_text(encoding="utf-8")
        assert text.count(":8083") == 1
        file.write_text(text.replace(":8083", f":{self.port}"), encoding="utf-8")
        return [caddy, "run", "--config", str(file), "--adapter", "caddyfile"]

    def environment(self) -> dict[str, str]:
        """Folders that it may write."""
        folder = str(self.folder)
        return {"REPORTS_FOLDER": str(self._batch), "XDG_CONFIG_HOME": folder, "XDG_DATA_HOME": folder}

    def is_ready(self) -> bool:
        """Whether it listens."""
        return is_listening(self.port)
