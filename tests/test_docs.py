"""The documentation, run as it stands: what a page promises comes out.

Each page with commands is one shell, in a folder that looks like a clone. In the order of the page

- a block `sh` runs, and must succeed; the block `text` after it is what it must print;
- a block `python` runs; one with `title="FILE"`, of whatever language, is written to that file;
- any other block is parsed.

A block that cannot be run here says so in a comment before it, `<!-- not run: why -->` or `<!-- run by tests/FILE -->`;
its syntax is checked all the same. Addresses of servers are replaced by those of the tests' own.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from batch.settings import BatchSettings
from headrace import secret_files
from headrace.settings import PREFIX
from streaming.settings import StreamSettings
from tests import reference
from tests.servers import free_port
from tests.servers.repository import ROOT, environment

DOCS = ROOT / "docs"
FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>not run: .+?|run by .+?) -->\n+ *)?"
    r"```(?P<kind>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
MARK = "<<< block {} >>>"
NOT_RUN_AT_MOST = 32
PAGE_TIMEOUT_S = 570
KAFKA = "127.0.0.1:9092"


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    kind: str
    title: str | None
    mark: str | None
    text: str

    @property
    def is_run(self) -> bool:
        """Whether it is part of the page's script."""
        return self.mark is None and (self.title is not None or self.kind in {"sh", "python"})

    def script(self, number: int) -> str:
        """What the shell does for it."""
        if self.kind == "sh":
            return f"echo '{MARK.format(number)}'\n{self.text}"
        where = f"mkdir -p $(dirname {self.title})\ncat > {self.title}" if self.title else "python -"
        return f"echo '{MARK.format(number)}'\n{where} <<'END OF BLOCK'\n{self.text}END OF BLOCK\n"


def blocks_of(page: Path) -> list[Block]:
    found = [
        Block(
            match["kind"], match["title"], match["mark"], re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        )
        for match in FENCE.finditer(page.read_text(encoding="utf-8"))
    ]
    assert len(found) == page.read_text(encoding="utf-8").count("```") / 2, f"{page}: a block was not understood"
    return found


PAGES = sorted(DOCS.rglob("*.md"))
NAMES = [str(page.relative_to(DOCS)) for page in PAGES]
RUN = [page for page in PAGES if any(block.is_run for block in blocks_of(page))]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone, but for what it must not write to."""
    folder = tmp_path / "clone"
    folder.mkdir()
    shutil.copytree(ROOT / "feature_repo", folder / "feature_repo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "luigi.cfg", folder)
    for package in ("batch", "demo", "headrace", "streaming"):
        (folder / package).symlink_to(ROOT / package)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", RUN, ids=[str(page.relative_to(DOCS)) for page in RUN])
def test_a_page_does_what_it_says(page: Path, clone: Path, request: pytest.FixtureRequest) -> None:
    blocks = blocks_of(page)
    script = "".join(block.script(number) for number, block in enumerate(blocks) if block.is_run)
    addresses = {port: str(free_port()) for port in ("8082", "6066", "6566")}
    if KAFKA in script:
        addresses[KAFKA] = request.getfixturevalue("kafka")
    config = clone / "luigi.cfg"
    for written, real in addresses.items():
        script = script.replace(written, real)
        config.write_text(config.read_text(encoding="utf-8").replace(written, real), encoding="utf-8")
    output = shell(script, clone, web_port=addresses["6066"])
    for number, block in enumerate(blocks):
        if block.kind == "text" and block.mark is None:
            assert blocks[number - 1].is_run, f"block {number} is the output of no block that runs"
            printed = _of_block(output, number - 1)
            for line in block.text.splitlines():
                assert _pattern(line).search(printed), f"block {number}: expected `{line}`, found:\n{printed}"


def shell(script: str, folder: Path, **settings: object) -> str:
    """Run a script as a person's shell would; everything that it started ends with it."""
    log = folder.parent / "output.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env={**environment(**settings), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PAGE_TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    output = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode != 0:
        others = [f"\n{other}: {other.read_text(errors='replace')[-2_000:]}" for other in folder.parent.rglob("*.log")]
        pytest.fail(f"the page ended with {process.returncode}:\n{output[-4_000:]}{''.join(others)}")
    return output


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_is_not_run_is_well_formed(page: Path) -> None:
    for block in blocks_of(page):
        assert block.kind, f"a block names no language:\n{block.text}"
        if block.mark is not None and block.mark.startswith("run by "):
            assert (ROOT / block.mark.removeprefix("run by ")).exists(), block.mark
        _parse(block)


def _parse(block: Block) -> None:
    match block.kind:
        case "sh":
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        case "python":
            compile(block.text, block.title or "block", "exec")
        case "yaml":
            assert yaml.safe_load(block.text) is not None
        case "json":
            assert json.loads(block.text) is not None
        case "toml":
            assert tomllib.loads(block.text)
        case "ini":
            has_sections = block.text.lstrip().startswith("[")
            configparser.ConfigParser(interpolation=None).read_string(
                block.text if has_sections else f"[env]\n{block.text}"
            )
        case _:
            assert block.mark is not None or block.kind == "text", f"nothing looks at a block of {block.kind}"


def test_few_blocks_are_not_run() -> None:
    marks = [
        f"{page.name}: {block.mark}"
        for page in PAGES
        for block in blocks_of(page)
        if (block.mark or "").startswith("not run")
    ]
    assert len(marks) <= NOT_RUN_AT_MOST, "\n".join(marks)


@pytest.mark.parametrize("name", reference.pages())
def test_the_reference_is_what_the_code_says(name: str) -> None:
    found = (reference.FOLDER / name).read_text(encoding="utf-8")
    assert found == reference.pages()[name], "run `python -m tests.reference`"


def test_no_page_names_a_setting_that_there_is_not() -> None:
    known = {f"{PREFIX}{name.upper()}" for kind in (StreamSettings, BatchSettings) for name in kind.model_fields}
    known.add(secret_files.FOLDER)
    for page in [*PAGES, ROOT / "README.md"]:
        named = set(re.findall(rf"{PREFIX}[A-Z_]+[A-Z]", page.read_text(encoding="utf-8")))
        unknown = {name for name in named - known if not name.startswith((f"{PREFIX}TEST_", f"{PREFIX}PYTHON"))}
        assert not unknown, f"{page}: {unknown}"


def test_every_page_is_in_the_navigation() -> None:
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    reached = set(_leaves(config["project"]["nav"]))
    assert {name for name in NAMES if not name.startswith("adr/0")} == reached


def _leaves(tree: object) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    for branch in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _leaves(branch)


def test_links_of_the_first_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def _of_block(output: str, number: int) -> str:
    _, _, rest = output.partition(MARK.format(number))
    return rest.partition("<<< block ")[0]


def _pattern(line: str) -> re.Pattern[str]:
    """A line of the page anywhere in a line of the output; `…` stands for anything, a space for any run of them."""
    words = [re.escape(word).replace("…", ".*") for word in line.split()]
    return re.compile(r"\s+".join(words))
