"""What the worker logs: changes of state, for people or as JSON; not what Faust and aiokafka do to get there.

At debug everything is shown. Above it Faust and aiokafka are heard from warnings on, without those that are part of
every rebalance, and what they repeat is shown once in a while, with how often it came.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any, Literal

HOSTS = ("faust", "mode", "aiokafka")
HARMLESS = (
    "Heartbeat failed for group %s because it is rebalancing",
    # Of a broker whose first group this is, for a moment.
    "Group Coordinator Request failed: [Error 15]",
    "Timer ",  # of a busy machine
)
REPEAT_S = 30.0
FIELDS = ("view", "topic", "partition")

QUIET = logging.getLogger("faust.headrace")
"""For subclasses of Faust's services, whose comings and goings are Faust's."""


class Hush(logging.Filter):
    """Lets through a host's warning when it is no harmless one, and the same one not again for a while.

    The same is what the same line of code said; its first arguments are shown.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a record; says how many like it were not."""
        if not record.name.startswith(HOSTS) or record.levelno >= logging.CRITICAL:
            return True
        if record.msg.__class__ is str and (
            record.msg.startswith(HARMLESS) or record.getMessage().startswith(HARMLESS)
        ):
            return False
        key = (record.pathname, record.lineno)
        shown_s, hidden = self._seen.get(key, (float("-inf"), 0))
        if self._clock() - shown_s < REPEAT_S:
            self._seen[key] = (shown_s, hidden + 1)
            return False
        self._seen[key] = (self._clock(), 0)
        if hidden:
            record.msg, record.args = f"{record.getMessage()} (and {hidden} times like it meanwhile)", ()
        return True


class TextFormatter(logging.Formatter):
    """One line, but for tracebacks: time in UTC, level, logger, message."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)-8s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message; view, topic, partition, error where known."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        values: dict[str, Any] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        values |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info and record.exc_info[0] is not None:
            values["error"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def set_up(root: logging.Logger, level: int, form: Literal["text", "json"]) -> None:
    """Change what Faust set up."""
    for handler in root.handlers:
        handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    if level > logging.DEBUG:
        hush = Hush()
        for handler in root.handlers:
            handler.addFilter(hush)
        for host in HOSTS:
            logging.getLogger(host).setLevel(max(level, logging.WARNING))


def silence_hosts() -> None:
    """The worker has said why it ends; what Faust says of it, with tracebacks, would hide that."""
    for host in HOSTS:
        if not logging.getLogger(host).isEnabledFor(logging.DEBUG):
            logging.getLogger(host).setLevel(logging.CRITICAL + 1)
