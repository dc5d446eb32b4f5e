"""Where the demonstration keeps things, and the settings that its processes share."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
DATABASE = DATA / "source.db"
ADDRESS_FILE = DATA / "broker.address"
REPORTS = DATA / "batch"
LOGS = DATA / "logs"
TOPIC = "drivers"
DEAD_LETTERS = "drivers.dlq"

LUIGI_PORT = 8082
REPORTS_PORT = 8083
WORKER_PORT = 6066
UI_PORT = 8888
SERVE_PORT = 6566


def program(name: str) -> str:
    """Return the path of a command of the environment that runs us."""
    return str(Path(sys.executable).parent / name)


def environment() -> dict[str, str]:
    """Return the environment of a process of the demonstration; `HEADRACE_*` set outside does not count."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")},
        "HEADRACE_FEATURE_REPO": str(ROOT / "feature_repo"),
        "HEADRACE_SOURCE_URL": f"sqlite:///{DATABASE}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def is_free(port: int) -> bool:
    """Return whether we could listen on this loopback port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def port_or_free(port: int) -> int:
    """Return this port, or a free one where it is taken."""
    if is_free(port):
        return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        found: int = listener.getsockname()[1]
        return found


def answers(url: str) -> bool:
    """Return whether a GET is answered with success."""
    try:
        with urlopen(url, timeout=2.0) as response:  # noqa: S310 - loopback addresses that we made
            return bool(response.status < 400)
    except (URLError, OSError):
        return False
