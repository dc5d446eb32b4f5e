"""Every error that Headrace raises on purpose.

HeadraceError
├── TransientError          a retry may help
│   └── LostRaceError       another writer extended the chain first
└── TerminalError           a retry is useless
├── ConfigError         a setting, the registry or a view is wrong
├── SchemaError         data does not fit its view
├── LedgerError         the files of a chain contradict each other
└── ChainClosedError    the epoch was closed, its successor goes on
"""

from __future__ import annotations


class HeadraceError(Exception):
    """The root of Headrace's own errors. The message says what was expected, found, where, and what to do."""


class TransientError(HeadraceError):
    """A retry may help."""


class TerminalError(HeadraceError):
    """A retry is useless until somebody changes something."""


class ConfigError(TerminalError, ValueError):
    """A setting, the registry, or a view's declaration is wrong."""


class SchemaError(TerminalError, ValueError):
    """Data does not fit the view it is meant for. Nothing of it was written."""


class LedgerError(TerminalError):
    """The files of a chain leave a hole, overlap, or cannot be read: its end is in doubt."""


class ChainClosedError(TerminalError):
    """The epoch of a chain was closed; nothing can be appended to it any more."""


class LostRaceError(TransientError):
    """Another writer extended the chain first.

    Attributes:
        end: the position where the chain ends now; what lies below it is already stored.
    """

    def __init__(self, message: str, end: int) -> None:
        super().__init__(message)
        self.end = end

    def __reduce__(self) -> tuple[type[LostRaceError], tuple[str, int]]:
        return (type(self), (str(self), self.end))
