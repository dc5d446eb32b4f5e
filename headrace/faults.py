"""Numbered steps of everything that changes a store, so that a test can end the process at each of them.

Nothing happens at a step unless a test sets `hook`; no setting reaches it.
"""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None


def reached(step: str) -> None:
    """Say that a step was reached: `<operation>.<number>.<what was done>`, such as `append.3.linked`."""
    if hook is not None:
        hook(step)
