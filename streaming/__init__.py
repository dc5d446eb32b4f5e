"""The stream: a Faust app that brings Kafka events through Feast into both stores, exactly once offline.

`faust -A streaming worker -l info` is the daemon. `streaming.app` is built when it is first asked for, from the
settings and the registry; it needs no broker.
"""

# ruff: noqa: PLC0415 - importing the package alone must import neither Faust nor Feast

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streaming.worker import HeadraceApp

    app: HeadraceApp

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    """Build the app on first use.

    Raises:
        Refused: the settings or the registry are wrong, or it is away; Faust's command line shows its one line.
    """
    if name != "app":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    import os
    import sys

    from headrace.errors import HeadraceError
    from headrace.quick_import import leave_feast_unchecked
    from streaming.ending import Refused, leave_on_signals

    if "worker" in sys.argv:  # Faust reads the command line later, and the imports below take seconds
        leave_on_signals()
    leave_feast_unchecked()
    # The Prometheus client turns to files, as for a server of many processes, if it is told to, which Feast does where
    # it is imported first: here, and in a process that starts this one.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    from streaming import health  # noqa: F401
    from streaming.worker import create_app

    try:
        globals()["app"] = create_app()
    except HeadraceError as error:
        raise Refused(str(error)) from None
    return globals()["app"]
