"""The demonstration that stays: `make up`.

Prepares the source database and the registry, then hands over to honcho, which runs the Procfile to Ctrl-C:
the embedded broker, Luigi's scheduler, the reports, the worker, a steady emitter, the batch chain for yesterday and an
audit once, and Feast's server and UI.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

from demo.place import (
    ADDRESS_FILE,
    DATABASE,
    LOGS,
    LUIGI_PORT,
    REPORTS,
    REPORTS_PORT,
    ROOT,
    SERVE_PORT,
    UI_PORT,
    WORKER_PORT,
    environment,
    is_free,
    program,
)
from demo.processes import Children, DemoError, Interrupt, raise_on_signals
from demo.source import fill

PORTS = {
    "LUIGI_PORT": LUIGI_PORT,
    "REPORTS_PORT": REPORTS_PORT,
    "HEADRACE_WEB_PORT": WORKER_PORT,
    "UI_PORT": UI_PORT,
    "SERVE_PORT": SERVE_PORT,
}


def prepare() -> dict[str, str]:
    """Fill the database, apply the repository, and return the environment of the processes.

    Raises:
        DemoError: A port is taken, or a step failed.
    """
    ports = {name: int(os.environ.get(name, port)) for name, port in PORTS.items()}
    for name, port in ports.items():
        if not is_free(port):
            raise DemoError(f"port {port} is taken; end what listens there, or choose another: {name}=... make up")
    REPORTS.mkdir(parents=True, exist_ok=True)
    ADDRESS_FILE.unlink(missing_ok=True)
    settings = {
        **environment(),
        **{name: str(port) for name, port in ports.items()},
        "HEADRACE_REPORT_URL": f"http://127.0.0.1:{ports['REPORTS_PORT']}",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    with Children(LOGS, settings, ROOT) as children:
        children.start("feast apply", [program("feast"), "-c", "feature_repo", "apply"])
        print(f"source database: {fill(DATABASE, until=datetime.now(UTC)):,} rows, some dirty", flush=True)
        children.finish("feast apply", timeout_s=60)
        print("feature repository applied to the registry", flush=True)
    print(
        f"\n  Luigi's scheduler   http://127.0.0.1:{ports['LUIGI_PORT']}/\n"
        f"  reports             http://127.0.0.1:{ports['REPORTS_PORT']}/history.html, and what Luigi's pages link\n"
        f"  worker's status     http://127.0.0.1:{ports['HEADRACE_WEB_PORT']}/ (/metrics, /healthz, /readyz)\n"
        f"  feast serve         http://127.0.0.1:{ports['SERVE_PORT']}/get-online-features (POST; /docs has the form)\n"
        f"  feast ui            http://127.0.0.1:{ports['UI_PORT']}/\n\n"
        "  The embedded broker forgets everything when it ends. Ctrl-C ends it all; data/ stays.\n",
        flush=True,
    )
    return settings


def main() -> None:
    """Prepare, and become honcho."""
    raise_on_signals()
    try:
        settings = prepare()
    except DemoError as exc:
        print(f"\nmake up: {exc}", file=sys.stderr)
        sys.exit(1)
    except Interrupt as exc:
        print(f"\nmake up: ended by {exc}; no process left", file=sys.stderr)
        sys.exit(128 + exc.number)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    honcho = program("honcho")
    os.chdir(ROOT)
    os.execve(honcho, [honcho, "start"], settings)  # noqa: S606 - to be honcho is the point


if __name__ == "__main__":
    main()
