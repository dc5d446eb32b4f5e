"""Tables that tests have printed at the end of the run, also where other processes run the tests."""

from __future__ import annotations

import pytest

_TABLES = pytest.StashKey[list[str]]()


def tables(config: pytest.Config) -> list[str]:
    """Where a test adds its table."""
    output: dict[str, list[str]] | None = getattr(config, "workeroutput", None)
    if output is not None:
        return output.setdefault("tables", [])
    return config.stash.setdefault(_TABLES, [])
