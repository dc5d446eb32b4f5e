"""The commands of the documentation, run as they stand: what a page promises comes out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.servers import free_port
from tests.servers.repository import ROOT, environment

FENCE = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "<<< block {} >>>"


def test_the_batch_chain_step_by_step(tmp_path: Path) -> None:
    """The commands of a page in one shell, in their order; each `text` block is what the one before it must print."""
    shutil.copytree(ROOT / "feature_repo", tmp_path / "feature_repo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "luigi.cfg", tmp_path)
    port = str(free_port())
    config = tmp_path / "luigi.cfg"
    config.write_text(config.read_text().replace("8082", port))
    blocks = FENCE.findall((ROOT / "docs" / "batch.md").read_text(encoding="utf-8").replace("8082", port))
    script = "".join(f"echo '{MARK.format(i)}'\n{text}" for i, (kind, text) in enumerate(blocks) if kind == "sh")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4_000:]
    assert blocks
    for number, (kind, text) in enumerate(blocks):
        if kind == "text":
            printed = _of_block(done.stdout, number - 1)
            for line in text.splitlines():
                assert _pattern(line).search(printed), f"block {number}: expected `{line}`, found:\n{printed}"


def _of_block(output: str, number: int) -> str:
    _, _, rest = output.partition(MARK.format(number))
    return rest.partition("<<< block ")[0]


def _pattern(line: str) -> re.Pattern[str]:
    """A line of the page anywhere in a line of the output; `…` stands for anything, a space for any run of them."""
    words = [re.escape(word).replace("…", ".*") for word in line.split()]
    return re.compile(r"\s+".join(words))
