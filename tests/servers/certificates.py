"""Certificates of a test's own, made by `openssl`: an authority, and what it signs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.servers.process import ServerError, UnavailableError


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, PEM each."""

    file: Path
    key: Path

    def joined(self) -> Path:
        """Key and certificate in one file, as Kafka reads them."""
        both = self.file.with_suffix(".both.pem")
        both.write_bytes(self.key.read_bytes() + self.file.read_bytes())
        return both


class Authority:
    """Signs certificates that are valid for two days.

    Args:
        folder: where the files are put.
    """

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self._key = folder / "ca.pem", folder / "ca.key"
        made = ["-x509", "-days", "2", "-subj", f"/CN={name}", "-keyout", self._key, "-out", self.file]
        openssl("req", *_NEW_KEY, "-nodes", *made)

    def sign(self, name: str, *, hosts: Sequence[str] = (), password: str | None = None) -> Certificate:
        """Make a certificate.

        Args:
            name: its common name.
            hosts: whom it is for, as OpenSSL writes it: `DNS:localhost`, `IP:127.0.0.1`.
            password: what the key is encrypted by.
        """
        made = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        request, extensions = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        secret = ["-nodes"] if password is None else ["-passout", "env:KEY_PASSWORD"]
        new = ["-subj", f"/CN={name}", "-keyout", made.key, "-out", request]
        openssl("req", *_NEW_KEY, *secret, *new, password=password)
        extensions.write_text(f"subjectAltName={','.join(hosts)}\n" if hosts else "basicConstraints=CA:FALSE\n")
        signing = ["-CA", self.file, "-CAkey", self._key, "-CAcreateserial", "-days", "2", "-extfile", extensions]
        openssl("x509", "-req", "-in", request, *signing, "-out", made.file)
        return made


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")


def openssl(*arguments: object, data: bytes = b"", password: str | None = None) -> bytes:
    """Run `openssl` and return what it prints.

    Raises:
        UnavailableError: it is not installed.
        ServerError: it failed.
    """
    if shutil.which("openssl") is None:
        raise UnavailableError("certificates need `openssl`: `apt-get install openssl`")
    environment = os.environ | ({} if password is None else {"KEY_PASSWORD": password})
    command = ["openssl", *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, check=False, env=environment)
    if done.returncode != 0:
        raise ServerError(f"{' '.join(command)} failed: {done.stderr.decode(errors='replace')}")
    return done.stdout
