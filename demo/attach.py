"""Run a command beside the embedded broker: wait for it, tell the command where it is, and become it.

    python -m demo.attach [--new-epoch] [--ready URL] -- faust -A streaming worker -l info

The Procfile starts all its processes at once, and the embedded broker chooses its port; this is what
orders them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from demo.place import ADDRESS_FILE, TOPIC, answers, program

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_S = 60.0


def wait_for(what: str, is_there: Callable[[], bool]) -> None:
    """Wait until something is there.

    Raises:
        SystemExit: It is not in time; says what was waited for.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while not is_there():
        if time.monotonic() > deadline:
            sys.exit(f"waited {TIMEOUT_S:.0f} s for {what} in vain; the log of that process says why")
        time.sleep(0.1)


def main() -> None:
    """Wait as asked and run the command."""
    parser = argparse.ArgumentParser(prog="python -m demo.attach", description="Run a command beside the broker.")
    parser.add_argument("--new-epoch", action="store_true", help="first begin a new epoch of the topic")
    parser.add_argument("--ready", metavar="URL", help="first wait until this answers")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    arguments = parser.parse_args()
    command = [word for word in arguments.command if word != "--"]
    if not command:
        parser.error("name a command after --")

    wait_for("the embedded broker", ADDRESS_FILE.exists)
    os.environ["HEADRACE_BROKER"] = ADDRESS_FILE.read_text(encoding="utf-8").strip()
    if arguments.new_epoch:
        start = [program("faust"), "-A", "streaming", "start", "--topic", TOPIC, "--new-epoch"]
        done = subprocess.run(start, check=False)
        if done.returncode != 0:
            sys.exit(done.returncode)
    if arguments.ready is not None:
        wait_for(arguments.ready, lambda: answers(arguments.ready))
    found = shutil.which(command[0]) or program(command[0])
    os.execv(found, [found, *command[1:]])  # noqa: S606 - to be the command is the point


if __name__ == "__main__":
    main()
