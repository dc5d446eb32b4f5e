"""What an operator wants to know of a worker, as one JSON document: `/status.json`, and the page that shows it.

Names and texts of events, views and topics come from elsewhere: they are cut here, and escaped where they are shown.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from headrace import __version__
from headrace.census import Census, census
from headrace.conform import Reason
from headrace.runs import Run, report_link
from streaming.broker import Broker
from streaming.health import FRESHNESS_BOUNDS_S, OFFLINE, ONLINE, STEP_BOUNDS_S, Fault, Freshness, Health
from streaming.letters import StoredLetter
from streaming.lookups import Answer, Letters, LetterWatch, LookUp, Runs, RunWatch, Topics, topics
from streaming.recent import Counts, Recent, quantile, quantiles
from streaming.settings import StreamConfig, View

STEPS = ("decode", "dead_letters", "online", "offline")
LONGEST_TEXT = 300
SHOWN_RUNS = 10

GATE = "ExploreAndValidate"
AUDIT = "Audit"
COMPACT = "Compact"
VERDICTS = {
    (GATE, "done"): "passed",
    (GATE, "GateClosedError"): "gate closed",
    (AUDIT, "done"): "stores agree",
    (AUDIT, "DivergedError"): "stores differ",
}

Result = TypeVar("Result")
Json = dict[str, Any]
Place = tuple[str, str, int]


@dataclass(frozen=True)
class Moment:
    """What only the event loop knows, at one moment.

    Attributes:
        faults: what `/readyz` says.
        own: of each partition that this worker has, by view, topic and number, the ledger's end and the lag.
        assigned: how many partitions this worker has.
        waiting_ms: by view and store, when the oldest event that waits was produced.
    """

    faults: Sequence[Fault]
    own: Mapping[Place, tuple[int, int | None]]
    assigned: int
    waiting_ms: Mapping[tuple[str, str], int]
    views: Sequence[View]

    @cached_property
    def places(self) -> set[tuple[str, int]]:
        """This worker's partitions, by topic and number."""
        return {(topic, number) for _, topic, number in self.own}


class Board:
    """All that is known of the worker, its partitions, folders, letters and batch runs.

    Args:
        moment: asked of the event loop.
    """

    def __init__(self, config: StreamConfig, health: Health, moment: Callable[[], Moment]) -> None:
        self._config = config
        self._health = health
        self._moment = moment
        self._started_s = time.time()
        self._views = [view for views in config.views.values() for view in views]
        # A client of its own, made when somebody first looks: what it waits for, the stream does not.
        broker = lru_cache(lambda: Broker(config))
        self._topics = LookUp("status-topics", lambda: topics(config, broker()), 3.0)
        self._letters = LookUp("status-letters", LetterWatch(config, broker), 5.0)
        self._runs = LookUp("status-runs", RunWatch(config), 10.0)
        self._folders = {view.contract.name: _folder_look_up(view) for view in self._views}

    @property
    def look_ups(self) -> list[LookUp[Any]]:
        """The questions that the document needs answered."""
        return [self._topics, self._letters, self._runs, *self._folders.values()]

    def moment(self) -> Moment:
        """Of the event loop."""
        return self._moment()

    def document(self, moment: Moment) -> Json:
        """The status. Pure of I/O; of any thread."""
        now_s = time.time()
        found, runs = self._topics.answer(), self._runs.answer()
        compacted_s = _compacted_s(runs)
        views = [self._view(view, moment, compacted_s, now_s) for view in moment.views]
        return {
            "version": 1,
            "time": _iso(now_s),
            "worker": self._worker(moment, found),
            "ready": not moment.faults,
            "faults": [{"kind": fault.kind.value, "text": fault.text} for fault in moment.faults],
            "views": views,
            "partitions": {**_known(found), "values": self._partitions(moment, found)},
            "dead_letters": _letters(self._letters.answer()),
            "batch": _batch(runs, self._config.settings.report_url),
        }

    def _worker(self, moment: Moment, found: Answer[Topics]) -> Json:
        group = None if found.value is None else found.value.group
        of_all = None if found.value is None else sum(found.value.partitions.values())
        settings = self._config.settings
        return {
            "host": socket.gethostname(),
            "port": settings.web_port,
            "pid": os.getpid(),
            "version": __version__,
            "project": self._config.store.project,
            "group": self._config.group,
            "group_state": None if group is None else group.state,
            "workers": None if group is None else group.members,
            "started": _iso(self._started_s),
            "partitions": moment.assigned,
            "partitions_of_all": of_all,
        }

    def _view(self, view: View, moment: Moment, compacted_s: Mapping[str, float], now_s: float) -> Json:
        name = view.contract.name
        recent, wanted = self._health.recent, view.contract.objectives.of_stores()
        waiting_s = {
            store: max(0.0, now_s - moment.waiting_ms[name, store] / 1000)
            if (name, store) in moment.waiting_ms
            else None
            for store in (ONLINE, OFFLINE)
        }
        return {
            "view": name,
            "topic": view.contract.topic,
            "freshness": {
                store: freshness(recent, name, store, wanted.get(store), waiting_s[store])
                for store in (ONLINE, OFFLINE)
            },
            "events": events(recent, name),
            "steps": {step: durations(recent, name, step) for step in STEPS},
            "files": _files(self._folders[name].answer(), compacted_s.get(name)),
        }

    def _partitions(self, moment: Moment, found: Answer[Topics]) -> list[Json]:
        rows: list[Json] = []
        for view in self._views:
            name, topic = view.contract.name, str(view.contract.topic)
            files = self._folders[name].answer().value
            known = {number for own_topic, number in moment.places if own_topic == topic}
            count = None if found.value is None else found.value.partitions.get(topic)
            numbers = sorted(known) if count is None else range(max([count, *(n + 1 for n in known)]))
            rows += [{"view": name, **_partition((name, topic, n), moment, found.value, files)} for n in numbers]
        return rows


def freshness(recent: Recent, view: str, store: str, objective_s: float | None, waiting_s: float | None) -> Json:
    """How fresh a store of a view is, now and over the hour, and what that is against its objective.

    `minutes` has 60 entries, the oldest first: p50, p99 and how many events, or null without events.
    """
    key = Freshness.key(view, store)
    now, hour, minutes = recent.now(key), recent.hour(key), recent.minutes(key)
    by_minute = [] if minutes is None else _by_minute(minutes)
    counted = [minute for minute in by_minute if minute is not None]
    met = sum(1 for _, p99_s, _ in counted if objective_s is not None and p99_s <= objective_s)
    verdict, why = judge(_raw(now, 0.99), objective_s, waiting_s)
    return {
        "objective_s": objective_s,
        "verdict": verdict,
        "why": why,
        "waiting_s": None if waiting_s is None else round(waiting_s, 3),
        "now": _quantiles(now, FRESHNESS_BOUNDS_S),
        "hour": _quantiles(hour, FRESHNESS_BOUNDS_S),
        "minutes": by_minute,
        "minutes_with_events": len(counted),
        "minutes_met": None if objective_s is None else met,
    }


def judge(p99_s: float | None, objective_s: float | None, waiting_s: float | None) -> tuple[str, str]:
    """Whether an objective is `met` or `missed` now; else `idle`, `none` or `unknown`; and why, in words."""
    if objective_s is None:
        return "none", "no objective"
    if waiting_s is not None and waiting_s > objective_s:
        return "missed", f"an event has waited {seconds_text(waiting_s)}"
    if p99_s is None:
        return "idle", "no events"
    if math.isinf(p99_s) and objective_s >= FRESHNESS_BOUNDS_S[-1]:
        return "unknown", f"more than {FRESHNESS_BOUNDS_S[-1]:g} s is not told apart"
    return ("met" if p99_s <= objective_s else "missed"), ""


def events(recent: Recent, view: str) -> Json:
    """What became of a view's events: a second now, and counts of the hour."""
    reasons = [reason.value for reason in Reason]
    width = 3 + len(reasons)
    now, hour = recent.now(("events", view)), recent.hour(("events", view))
    spent_s = recent.now_s()
    a_second = [round(float(count) / spent_s, 3) for count in (now if now is not None else [0] * width)]
    of_hour = [int(count) for count in (hour if hour is not None else [0] * width)]

    def named(counts: Sequence[Any]) -> Json:
        received, accepted, skipped, *rejected = counts
        return {"received": received, "accepted": accepted, "rejected": sum(rejected), "skipped": skipped}

    by_reason = {reason: count for reason, count in zip(reasons, of_hour[3:], strict=True) if count}
    return {"a_second": named(a_second), "hour": named(of_hour), "rejected_by_reason": by_reason}


def durations(recent: Recent, view: str, step: str) -> Json:
    """How long a step takes for a batch, now and over the hour."""
    key = ("step", view, step)
    return {"now": _quantiles(recent.now(key), STEP_BOUNDS_S), "hour": _quantiles(recent.hour(key), STEP_BOUNDS_S)}


def seconds_text(seconds: float | None) -> str:
    """A duration for people, three digits."""
    if seconds is None:
        return ""
    for bound, unit, name in ((1.0, 0.001, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min"), (172_800.0, 3600.0, "h")):
        if seconds < bound:
            return f"{_three(seconds / unit)} {name}"
    return f"{seconds / 86_400:,.0f} days"


def _three(number: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _raw(counts: Counts | None, share: float) -> float | None:
    return None if counts is None else quantile(counts, FRESHNESS_BOUNDS_S, share)


def _quantiles(counts: Counts | None, bounds: Sequence[float]) -> Json:
    """p50 and p99; the last bound means that or more."""
    found = {
        name: None
        if counts is None or (value := quantile(counts, bounds, share)) is None
        else round(min(value, bounds[-1]), 6)
        for name, share in (("p50_s", 0.5), ("p99_s", 0.99))
    }
    return {**found, "count": 0 if counts is None else int(counts.sum())}


def _by_minute(minutes: Counts) -> list[tuple[float, float, int] | None]:
    """Of each minute p50, p99 and how many events; None without events."""
    last_s = FRESHNESS_BOUNDS_S[-1]
    p50, p99 = (quantiles(minutes, FRESHNESS_BOUNDS_S, share) for share in (0.5, 0.99))
    return [
        None if low is None or high is None else (round(min(low, last_s), 6), round(min(high, last_s), 6), count)
        for low, high, count in zip(p50, p99, minutes.sum(axis=1).tolist(), strict=True)
    ]


def _partition(place: Place, moment: Moment, known: Topics | None, files: Census | None) -> Json:
    """One partition of a view: where its ledger and its log end, and who has it."""
    _, topic, number = place
    own = moment.own.get(place)
    log = None if known is None else known.logs.get((topic, number))
    end = own[0] if own is not None else None if files is None else files.ends.get((topic, number))
    ends = [log.latest] if log is not None else []
    if own is not None and own[1] is not None:
        ends.append(own[0] + own[1])
    log_end = max(ends, default=None)
    begin = end if end is not None else log.earliest if log is not None and files is not None else None
    is_own = (topic, number) in moment.places
    owner = None if known is None or known.group is None else known.group.owners.get((topic, number))
    return {
        "topic": topic,
        "partition": number,
        "ledger_end": end,
        "log_end": log_end,
        "lag": None if log_end is None or begin is None else max(0, log_end - begin),
        "owner": "this worker" if is_own else owner,
        "is_owner_known": is_own or (known is not None and known.group is not None),
    }


def _files(found: Answer[Census], compacted_s: float | None) -> Json:
    value = found.value
    merged_s = [at_s for at_s in (compacted_s, None if value is None else value.merged_s) if at_s is not None]
    counts = None if value is None else (value.appended, value.merged, value.retained, value.days)
    return {
        **_known(found),
        **dict(zip(("appended", "merged", "retained", "days"), counts or [None] * 4, strict=True)),
        "compacted": _iso(max(merged_s)) if merged_s else None,
    }


def _compacted_s(found: Answer[Runs]) -> dict[str, float]:
    """By view, when the batch chain last compacted it, as its ledger says."""
    done: dict[str, float] = {}
    for run in _runs(found):
        if run.task == COMPACT and run.outcome == "done" and run.end is not None:
            done[run.view] = max(run.end.timestamp(), done.get(run.view, 0.0))
    return done


def _letters(found: Answer[Letters]) -> Json:
    value = found.value
    newest = () if value is None else value.newest
    return {
        **_known(found),
        "records": None if value is None else value.count,
        "newest": [_letter(letter) for letter in newest],
    }


def _letter(letter: StoredLetter) -> Json:
    value = letter.value
    return {
        "time": _iso(letter.written_ms / 1000),
        "view": _cut(letter.view),
        "reason": _cut(letter.reason),
        "field": _cut(letter.field),
        "message": _cut(letter.message),
        "topic": _cut(letter.topic),
        "partition": letter.origin_partition,
        "offset": letter.origin_offset,
        "bytes": letter.size,
        "begins": None if value is None else value.decode("utf-8", "backslashreplace"),
        "is_cut": letter.size > len(value or b""),
    }


def _batch(found: Answer[Runs], report_url: str | None) -> Json:
    runs = _runs(found)
    last: dict[tuple[str, str], Run] = {}
    for run in runs:
        last[run.view, run.task] = run
    return {
        **_known(found),
        "folder": None if found.value is None else str(found.value.folder),
        "has_run": None if found.value is None else found.value.runs is not None,
        "last": [_run(run, found, report_url) for _, run in sorted(last.items())],
        "newest": [_run(run, found, report_url) for run in reversed(runs[-SHOWN_RUNS:])],
    }


def _runs(found: Answer[Runs]) -> tuple[Run, ...]:
    return () if found.value is None or found.value.runs is None else found.value.runs


def _run(run: Run, found: Answer[Runs], report_url: str | None) -> Json:
    error_type = (run.error or "").partition(":")[0]
    outcome = run.outcome or "running"
    return {
        "task": _cut(run.task),
        "view": _cut(run.view),
        "day": _cut(run.parameters.get("date", "")),
        "start": run.start.astimezone(UTC).isoformat(timespec="seconds"),
        "duration_s": run.duration_s,
        "outcome": outcome,
        "verdict": VERDICTS.get((run.task, outcome)) or VERDICTS.get((run.task, error_type), outcome),
        "attempt": run.attempt,
        "rows": run.rows,
        "error": None if run.error is None else _cut(run.error),
        "host": _cut(run.host),
        "report": None if run.report is None or found.value is None else str(found.value.folder / run.report),
        "link": None if run.report is None else report_link(report_url, run.report),
    }


def _known(found: Answer[Any]) -> Json:
    """As of when something is known, and since when and why not."""
    return {
        "as_of": None if found.at_s is None else _iso(found.at_s),
        "not_known_since": None if found.unknown_since_s is None else _iso(found.unknown_since_s),
        "why": None if found.why is None else _cut(found.why),
    }


def _folder_look_up(view: View) -> LookUp[Census]:
    return LookUp(f"status-folder-{view.contract.name}", lambda: census(view.contract), 3.0)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _iso(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
