"""What an audit found, as a page for people, as JSON, and in one line."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batch.folder import write_json, write_text
from batch.pages import template
from headrace.audit import BACKWARD, FORWARD, Audit, Example, Kind

FAULTS = (*FORWARD, *BACKWARD)

MEANINGS = {
    Kind.EQUAL: "values and event time agree",
    Kind.MISSING: "no row online",
    Kind.STALE: "online has an older row",
    Kind.DIFFERENT: "online has another value of the same row",
    Kind.AHEAD: "online has a newer row that nothing offline accounts for",
    Kind.EXTRA: "online has a row, offline has none of that key",
    Kind.IN_FLIGHT: "online has a newer row of the stream, which is appended in a moment",
    Kind.PENDING: "offline has a row that no Materialize has applied yet",
    Kind.EXPIRED: "missing online, and old enough to have expired there",
    Kind.RETIRED: "online alone, and older than what retention keeps",
}


def write_audit(found: Audit, project: str, folder: Path) -> None:
    """Write `report.html` and, beside it, the same as `report.json`. Each appears whole."""
    content = {
        "view": found.view,
        "project": project,
        "ends_taken": found.at,
        "made": datetime.now(UTC),
        "sample": 1 if found.sample is None else found.sample.share,
        "keys_compared": found.keys,
        "diverged": found.diverged,
        "counts": as_json(found.counts),
        "examples": {
            kind.value: [asdict(each) for each in found.examples[kind]] for kind in Kind if kind in shown(found)
        },
        "repair": repair_command(found),
        "audit_s": round(found.seconds, 3),
    }
    write_json(folder / "report.json", content)
    page = template("audit.html.j2").render(
        r=content,
        kinds=[(kind, found.counts[kind], kind in FAULTS, MEANINGS[kind]) for kind in Kind if found.counts[kind]],
        examples=[(kind, each, unlike(each)) for kind in shown(found) for each in found.examples[kind]],
    )
    write_text(folder / "report.html", page)


def as_json(counts: Counter[Kind]) -> dict[str, int]:
    """Counts by the names of the kinds, in their order, zeros left out."""
    return {kind.value: counts[kind] for kind in Kind if counts[kind]}


def shown(found: Audit) -> list[Kind]:
    """The kinds of which there are examples, faults first."""
    others = [kind for kind in Kind if kind not in FAULTS]
    return [kind for kind in (*FAULTS, *others) if found.examples.get(kind)]


def unlike(example: Example) -> list[tuple[str, Any, Any]]:
    """The features that differ: name, offline and online."""
    offline, online = example.offline or {}, example.online or {}
    pairs = [(name, offline.get(name), online.get(name)) for name in {**offline, **online}]
    return [pair for pair in pairs if repr(pair[1]) != repr(pair[2])]  # NaN is unlike itself, and no difference


def summary(found: Audit) -> str:
    """How many keys differ, by kind."""
    kinds = ", ".join(f"{found.counts[kind]:,} {kind}" for kind in FAULTS if found.counts[kind])
    return f"{found.diverged:,} of {compared(found)} differ: {kinds}"


def compared(found: Audit) -> str:
    """How many keys were looked at, and of how many that is a sample."""
    return f"{found.keys:,} keys" + ("" if found.sample is None else f" of a sample ({found.sample.share:g} of all)")


def repair_command(found: Audit) -> str | None:
    """What mends it; None where nothing is to be mended."""
    if not found.diverged:
        return None
    backwards = " --backwards" if any(found.counts[kind] for kind in BACKWARD) else ""
    return f"luigi --module batch Repair --view {shlex.quote(found.view)}{backwards}"
