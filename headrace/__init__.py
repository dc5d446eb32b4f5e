"""Headrace: Feast stores that are never wrong. Offline history as chains of Parquet segments, newest-wins online."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.chains import files

__all__ = ["__version__", "files"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load `files` when it is first asked for: importing the package alone must not import Feast."""
    if name == "files":
        from headrace.chains import files  # noqa: PLC0415

        return files
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
