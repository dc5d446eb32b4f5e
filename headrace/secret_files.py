"""Secrets in files: a folder with a file each, as Compose, Kubernetes and systemd hand them to a process.

A setting `HEADRACE_X` may be a file of that name there (`headrace.settings`). Elsewhere, in `feature_store.yaml` and
in URLs, `${NAME}` stands for the file `name`: a variable `NAME` wins where Feast fills in variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from headrace.errors import ConfigError

FOLDER = "HEADRACE_SECRETS_DIR"
_DEFAULT = "/run/secrets"
_NAME = re.compile(r"\$\{(\w+)\}")


def folder() -> Path:
    """Where the files are: `HEADRACE_SECRETS_DIR`, or where Compose puts them. It need not exist."""
    return Path(os.environ.get(FOLDER) or _DEFAULT)


def filled(text: str, where: str, quote: Callable[[str], str] = str) -> str:
    """Replace each `${NAME}` by the variable of that name, or by the file of that name without its end of line.

    Args:
        text: what is written; messages show no more of it than the name. In names of files case does not matter.
        where: what it is, for messages.
        quote: how a secret is written there.

    Raises:
        ConfigError: there is neither such a variable nor such a file, or the file cannot be read.
    """

    def secret(found: re.Match[str]) -> str:
        name = found.group(1)
        return quote(os.environ[name] if name in os.environ else _read(name, where))

    return _NAME.sub(secret, text)


def _read(name: str, where: str) -> str:
    try:
        files = {path.name.lower(): path for path in folder().iterdir()} if folder().is_dir() else {}
        path = files.get(name.lower())
        if path is not None:
            return path.read_text(encoding="utf-8").rstrip("\r\n")
        reason = "there is neither that variable nor that file"
    except OSError as error:
        reason = f"the file cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        reason = "the file is not UTF-8"
    msg = (
        f"{where} names `${{{name}}}`, and {reason}; expected the variable {name}, or the file {name.lower()} in "
        f"{folder()} ({FOLDER} names another folder)"
    )
    raise ConfigError(msg)
