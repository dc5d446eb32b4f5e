"""The pages that show what was found, and the same as JSON."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pyarrow.parquet as pq

from batch.columns import number_text
from batch.explore import Findings
from batch.folder import DayFolder, write_json, write_text
from batch.gate import shorten
from batch.pages import template
from batch.plots import histogram

_SHOWN_REJECTS = 200
_SHOWN_CHARACTERS = 400


def write_report(findings: Findings, folder: DayFolder) -> None:
    """Write the page, and beside it the first rejected rows and all as JSON. Each appears whole, the page last."""
    write_json(folder.verdict, {**asdict(findings), "passed": findings.passed})
    write_text(
        folder.rejects_page,
        template("rejects.html.j2").render(f=findings, rejects=_first(folder), folder=folder, shorten=_cut),
    )
    write_text(
        folder.report,
        template("report.html.j2").render(
            f=findings,
            folder=folder,
            number=number_text,
            plot=histogram,
            shorten=_cut,
            checks=_by_weight(findings),
            anew=_anew(findings),
        ),
    )


def _anew(findings: Findings) -> str:
    """The command that does the day again, up to the name of the first task."""
    days = f"--start {findings.day} --stop {findings.day + timedelta(days=1)}"
    return f"luigi --module batch Backfill --view {shlex.quote(findings.view)} {days} --force-from"


def _by_weight(findings: Findings) -> list[Any]:
    """The checks, those that failed first."""
    return sorted(findings.checks, key=lambda check: (check.passed, check.severity))


def _first(folder: DayFolder) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with pq.ParquetFile(folder.rejects) as file:
        for batch in file.iter_batches(_SHOWN_REJECTS):
            rows += batch.slice(0, _SHOWN_REJECTS - len(rows)).to_pylist()
            if len(rows) == _SHOWN_REJECTS:
                break
    return rows


def _cut(text: str) -> str:
    return shorten(text, _SHOWN_CHARACTERS)
