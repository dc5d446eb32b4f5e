"""The whole path, once: `make demo`.

    python -m demo.run [--events 20000]

Starts the embedded broker, fills the source database, starts Luigi's scheduler and the worker, emits events
of which some are late, doubled or bad, runs the batch chain for yesterday, waits until all is drained, and
lets `demo.verify` compare the stores and print the table. Exits 0 only if everything agrees, and leaves no
process behind.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from demo.place import (
    ADDRESS_FILE,
    DATA,
    DATABASE,
    DEAD_LETTERS,
    LOGS,
    LUIGI_PORT,
    ROOT,
    TOPIC,
    WORKER_PORT,
    answers,
    environment,
    port_or_free,
    program,
)
from demo.processes import Children, DemoError, Interrupt, raise_on_signals

if TYPE_CHECKING:
    from collections.abc import Sequence

RATE = 4_000
BAD_FRACTION = 0.02
LATE_FRACTION = 0.05
DUPLICATE_FRACTION = 0.03


class Progress:
    """Lines that say what happens and how long it takes."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        """Print a line with the time since the beginning."""
        print(f"{self.elapsed_s:5.1f} s  {text}", flush=True)


def demonstrate(events: int) -> int:
    """Run the whole path and return the exit code."""
    progress = Progress()
    luigi_port = choose_port(LUIGI_PORT, "Luigi", progress)
    worker_port = choose_port(WORKER_PORT, "the worker", progress)
    worker_url = f"http://127.0.0.1:{worker_port}"

    settings = {**environment(), "HEADRACE_WEB_PORT": str(worker_port)}
    with Children(LOGS, settings, ROOT) as children:
        ADDRESS_FILE.unlink(missing_ok=True)
        python = sys.executable
        broker = [python, "-m", "demo.broker", "--address-file", str(ADDRESS_FILE), TOPIC, DEAD_LETTERS]
        children.start("broker", broker)
        children.start("feast apply", [program("feast"), "-c", "feature_repo", "apply"])
        children.start("luigid", luigid(luigi_port))
        children.start("source", [python, "-m", "demo.source", "--database", str(DATABASE)])
        children.wait("broker", ADDRESS_FILE.exists, timeout_s=15)
        settings["HEADRACE_BROKER"] = ADDRESS_FILE.read_text(encoding="utf-8").strip()
        progress.say(f"embedded broker on {settings['HEADRACE_BROKER']}: for trying, forgets all when it ends")
        is_continued = has_ledgers()
        if is_continued:
            children.start("new epoch", [*faust(), "start", "--topic", TOPIC, "--new-epoch"])
        children.finish("source", timeout_s=60)
        progress.say(f"source database: {children.text('source').strip().rpartition(': ')[2]}, some dirty")
        children.finish("feast apply", timeout_s=60)
        progress.say("feature repository applied to the registry")
        children.wait("luigid", lambda: answers(f"http://127.0.0.1:{luigi_port}/"))
        yesterday = datetime.now(UTC).date() - timedelta(days=1)
        chain = ["--scheduler-port", str(luigi_port), "Materialize", "--date", str(yesterday)]
        children.start("luigi", [program("luigi"), "--module", "batch", *chain])
        progress.say(f"batch chain for {yesterday}: Ingest, Clean, ExploreAndValidate, OfflineStore, Materialize")
        if is_continued:
            children.finish("new epoch", timeout_s=60)
            progress.say("the broker is a new one: ledgers of the last run closed, new epoch begun")
        children.start("worker", [*faust(), "worker", "-l", "info"])
        children.wait("worker", lambda: answers(f"{worker_url}/readyz"))
        progress.say(f"worker ready: {worker_url}/metrics")
        # What verifies starts early, because most of a start is Python importing Feast; it waits for the emitter.
        children.start("emit", emit(events))
        verify = ["--worker", worker_url, "--emitted", str(children.log("emit"))]
        verification = children.start("verify", [python, "-m", "demo.verify", *verify])
        progress.say(f"emitting {events:,} events, {RATE:,} a second; some late, doubled or bad")
        children.finish("luigi", timeout_s=90)
        progress.say("batch chain done")
        children.finish("emit", timeout_s=60)
        progress.say("emitted; waiting until the worker has drained the topic, to compare both stores value by value")
        while verification.poll() is None:
            children.check(apart_from="verify")
            time.sleep(0.05)
    conclude(children.text("verify"), progress, is_equal=verification.returncode == 0)
    return verification.returncode


def conclude(table: str, progress: Progress, *, is_equal: bool) -> None:
    """Print the table, where things are, and how it came out."""
    print(f"\n{table.rstrip()}\n")
    print(f"  logs           {LOGS.relative_to(ROOT)}/")
    print(f"  stores         {DATA.relative_to(ROOT)}/   (kept: the next run goes on from here)")
    print("  pages          `make up` runs the same and stays\n")
    progress.say("done, no process left" if is_equal else "NOT EQUAL: see above; no process left")


def choose_port(wanted: int, what: str, progress: Progress) -> int:
    """Return the port wanted, or a free one where another program has it, and say so."""
    port = port_or_free(wanted)
    if port != wanted:
        progress.say(f"port {wanted} is taken by another program: {what} takes {port} this time")
    return port


def has_ledgers() -> bool:
    """Return whether an earlier run left ledgers, which belong to a broker that is gone."""
    return any((DATA / "offline").glob("*/stream-*"))


def faust() -> list[str]:
    """Return the beginning of every command of the stream."""
    return [program("faust"), "-A", "streaming"]


def luigid(port: int) -> Sequence[str]:
    """Return the command of Luigi's central scheduler."""
    return [program("luigid"), "--address", "127.0.0.1", "--port", str(port)]


def emit(events: int) -> Sequence[str]:
    """Return the command of the stream emitter."""
    options = {
        "--rate": RATE,
        "--count": events,
        "--bad-fraction": BAD_FRACTION,
        "--late-fraction": LATE_FRACTION,
        "--duplicate-fraction": DUPLICATE_FRACTION,
    }
    return [*faust(), "emit", *(word for key, value in options.items() for word in (key, str(value)))]


def main() -> int:
    """Read the command line, run, and explain what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description="The whole path, once.")
    parser.add_argument("--events", type=int, default=20_000)
    arguments = parser.parse_args()
    raise_on_signals()
    try:
        return demonstrate(arguments.events)
    except DemoError as exc:
        print(f"\nmake demo: {exc}", file=sys.stderr)
        return 1
    except Interrupt as exc:
        print(f"\nmake demo: ended by {exc}; no process left", file=sys.stderr)
        return 128 + exc.number


if __name__ == "__main__":
    raise SystemExit(main())
