"""Prometheus metrics of the chain, for node_exporter's textfile collector: jobs end before they are scraped.

The file is its own memory: each run reads what it says, adds itself, and replaces it. So a run costs the same
whatever the history; counters of a file that was deleted start again at 0, which Prometheus understands.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from batch.folder import locked
from headrace.runs import Run

FILE = "headrace_batch.prom"

_SUCCESS = "headrace_batch_last_success_timestamp_seconds"
_DURATION = "headrace_batch_last_duration_seconds"
_ROWS = "headrace_batch_last_rows"
_RUNS = "headrace_batch_runs"
_FAILURE = "headrace_batch_failure_timestamp_seconds"
_DIVERGED = "headrace_batch_audit_diverged_keys"
_TASK = ("task", "view", "sample")
_LABELS = {
    _SUCCESS: _TASK,
    _DURATION: _TASK,
    _ROWS: _TASK,
    _RUNS: (*_TASK, "outcome"),
    _FAILURE: (*_TASK, "date"),
    _DIVERGED: ("view",),
}

_Samples = dict[str, dict[tuple[str, ...], float]]


class Runs(Collector):
    """What the file says. A collector of its own, because Feast makes the client's gauges count in files."""

    def __init__(self, samples: _Samples) -> None:
        self._samples = samples

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        for family in (
            GaugeMetricFamily(_SUCCESS, "When the task last succeeded for a day of its own run.", labels=_TASK),
            GaugeMetricFamily(_DURATION, "How long that took.", labels=_TASK),
            GaugeMetricFamily(_ROWS, "Rows it had; keys written, of Materialize; compared, of Audit.", labels=_TASK),
            CounterMetricFamily(_RUNS, "Tries of the task that ended, by outcome.", labels=_LABELS[_RUNS]),
            GaugeMetricFamily(
                _FAILURE,
                "When the task failed; gone as soon as it is done, for the same day.",
                labels=_LABELS[_FAILURE],
            ),
            GaugeMetricFamily(
                _DIVERGED,
                "Keys that an audit found to differ; 0 after an audit of all keys or a repair.",
                labels=_LABELS[_DIVERGED],
            ),
        ):
            for values, number in self._samples[family.name].items():
                family.add_metric(values, number)
            yield family


def count(path: Path, run: Run, *, diverged: int | None = None) -> None:
    """Add a run that ended to the file, atomically.

    A day that a later run read again counts as a run, but is not the task's last success, duration and rows. Of an
    audit of a sample the label `sample` is the share; of all else it is empty, which to Prometheus is no label.
    Failures are told by a gauge that stays until the day is done, and not by a counter alone: a counter that appears
    with its first failure has not risen, as far as Prometheus can see.

    Args:
        path: the file.
        run: the run.
        diverged: how many keys an audit found to differ. A sample in which none does takes nothing back.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock"), lambda: None):
        samples = _read(path)
        name = (run.task, run.view, run.sample)
        tries = (*name, str(run.outcome))
        samples[_RUNS][tries] = samples[_RUNS].get(tries, 0.0) + 1
        if run.outcome == "done" and run.end is not None and not run.is_reread:
            last = {_SUCCESS: run.end.timestamp(), _DURATION: run.duration_s, _ROWS: run.rows}
            for gauge, value in last.items():
                if value is not None:
                    samples[gauge][name] = value
        failure = (*name, run.parameters.get("date", ""))
        if run.outcome == "done":
            samples[_FAILURE].pop(failure, None)
        else:
            samples[_FAILURE][failure] = (run.end or run.start).timestamp()
        _count_diverged(samples[_DIVERGED], run, diverged)
        registry = CollectorRegistry()
        registry.register(Runs(samples))
        write_to_textfile(str(path), registry)


def _count_diverged(diverged_of: dict[tuple[str, ...], float], run: Run, diverged: int | None) -> None:
    if diverged is not None:
        diverged_of[run.view,] = diverged
    elif run.outcome == "done" and run.task in {"Audit", "Repair"}:
        if run.sample:
            diverged_of.setdefault((run.view,), 0)
        else:
            diverged_of[run.view,] = 0


def _read(path: Path) -> _Samples:
    """What the file says; nothing if there is none, or it is torn."""
    samples: _Samples = {name: {} for name in _LABELS}
    try:
        for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
            for sample in family.samples:
                samples[family.name][
                    *({"sample": "", "date": "", **sample.labels}[label] for label in _LABELS[family.name])
                ] = sample.value
    except (FileNotFoundError, ValueError, KeyError):
        return {name: {} for name in _LABELS}
    return samples
