"""The tour: every cell runs, checks what it claims, and shows what the committed notebook shows."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.servers.repository import ROOT

TOUR = ROOT / "notebooks" / "tour.ipynb"


def outputs(notebook: Any) -> list[list[tuple[str, str]]]:
    """By cell, what it shows as text; of a picture, that it is one. Without control characters."""
    return [
        [
            ("picture", "")
            if "image/png" in output.get("data", {})
            else (output.output_type, re.sub(r"\x1b\[[\d;]*m", "", output.get("text") or output.data["text/plain"]))
            for output in cell.get("outputs", [])
        ]
        for cell in notebook.cells
    ]


@pytest.mark.slow
def test_the_tour_shows_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = nbformat.read(TOUR, 4)
    run = nbformat.read(TOUR, 4)
    for cell in run.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    NotebookClient(run, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert outputs(run) == outputs(committed)
    assert not list(tmp_path.glob("headrace-tour-*")), "it leaves nothing behind"
    assert len([shown for cell in outputs(run) for shown, _ in cell if shown == "picture"]) == 2


def test_it_is_small_and_its_links_lead_somewhere() -> None:
    assert TOUR.stat().st_size < 200_000
    text = "\n".join(cell.source for cell in nbformat.read(TOUR, 4).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    assert all((TOUR.parent / link).exists() for link in links)
