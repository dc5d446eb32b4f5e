"""Faust commands of the stream: `faust -A streaming emit|start|restore|dead-letters|replay|verify ...`.

They only read options and print; what they do is in the modules of the same names.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar, NoReturn

import click
from faust.cli.base import AppCommand, option

from headrace import progress
from headrace.conform import Reason
from headrace.errors import HeadraceError
from streaming import emit as emitting
from streaming import letters as reading
from streaming import replay as replaying
from streaming import restore as restoring
from streaming import start as starting
from streaming import verify as verifying
from streaming.ending import give_up, leave
from streaming.settings import StreamConfig


class _Command(AppCommand):
    """A command that runs to its end and prints one line of JSON, or one line of what is wrong."""

    abstract: ClassVar[bool] = True

    @property
    def config(self) -> StreamConfig:
        """Settings and registry, as the app read them."""
        found: StreamConfig = self.app.config  # type: ignore[attr-defined]
        return found

    def finish(self, work: Callable[[], Mapping[str, object] | str]) -> NoReturn:
        """Do the work, print what it returns (as JSON, if it is no text), end: with 1 if it raises or is not `ok`.

        At once: an orderly end of Python waits for clients of a broker that is away, and the farewell of some libraries
        is pages of warnings.
        """
        progress.install()
        try:
            result = work()
        except HeadraceError as error:
            give_up(error)
        except KeyboardInterrupt:
            leave(130)
        sys.stdout.write((result if isinstance(result, str) else json.dumps(result)) + "\n")
        leave(0 if isinstance(result, str) or result.get("ok", True) else 1)


class emit(_Command):
    """Send made-up events of a view to its topic: a stream emitter for trying and testing."""

    abstract: ClassVar[bool] = False

    options = [  # noqa: RUF012 - Faust declares it as an attribute of instances
        option(
            "--rate",
            type=click.FloatRange(min=0),
            default=10.0,
            show_default=True,
            help="Events a second; 0: all at once.",
        ),
        option("--count", type=click.IntRange(min=0), default=0, show_default=True, help="How many; 0: until stopped."),
        option(
            "--bad-fraction",
            type=click.FloatRange(0, 1),
            default=0.0,
            help="Share of events with a fault, of every kind.",
        ),
        option("--late-fraction", type=click.FloatRange(0, 1), default=0.0, help="Share of events of an earlier time."),
        option("--duplicate-fraction", type=click.FloatRange(0, 1), default=0.0, help="Share of events sent twice."),
        option("--seed", type=int, default=None, help="The same seed makes the same events, but for their times."),
        option("--view", type=str, default=None, help="The view; needed if the views have several topics."),
        option("--keys", type=click.IntRange(min=1), default=1000, show_default=True, help="How many entities."),
        option("--yes", is_flag=True, help="Send to a broker that is not on this machine."),
    ]

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command."""
        chosen = self.kwargs
        plan = emitting.Plan(
            rate=chosen["rate"],
            count=chosen["count"] or None,
            bad_fraction=chosen["bad_fraction"],
            late_fraction=chosen["late_fraction"],
            duplicate_fraction=chosen["duplicate_fraction"],
            seed=chosen["seed"],
            keys=chosen["keys"],
        )
        self.finish(lambda: emitting.emit(self.config, plan, view=chosen["view"], anywhere=chosen["yes"]))


class start(_Command):
    """Say where a topic's ledgers start: a new epoch for a topic made anew, or a first position."""

    abstract: ClassVar[bool] = False

    options = [  # noqa: RUF012 - Faust declares it as an attribute of instances
        option("--topic", type=str, required=True, help="The topic."),
        option("--new-epoch", is_flag=True, help="The topic was made anew: close the ledgers and open new ones."),
        option(
            "--at",
            type=str,
            default=None,
            help="earliest, latest, group, a time such as 2026-01-31T12:00:00Z, or an offset each: 0:1200,1:990.",
        ),
    ]

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command."""
        chosen = self.kwargs
        if not chosen["new_epoch"] and chosen["at"] is None:
            raise click.UsageError("give --at, or --new-epoch, which starts at the earliest without it")
        if chosen["new_epoch"]:
            self.finish(lambda: starting.new_epoch(self.config, chosen["topic"], chosen["at"] or "earliest"))
        self.finish(lambda: starting.begin(self.config, chosen["topic"], chosen["at"]))


class restore(_Command):
    """Set damaged segments of a topic's ledgers aside, and read again from the topic what is missing."""

    abstract: ClassVar[bool] = False

    options = [  # noqa: RUF012 - Faust declares it as an attribute of instances
        option("--topic", type=str, required=True, help="The topic."),
        option("--view", type=str, default=None, help="Only the ledgers of this view."),
        option("--dry-run", is_flag=True, help="Read all segments, tell what is damaged or missing, change nothing."),
    ]

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command."""
        self.finish(self._restored)

    def _restored(self) -> Mapping[str, object]:
        chosen = self.kwargs
        with progress.shown("restore") as meter:
            return restoring.restore(
                self.config,
                chosen["topic"],
                only=chosen["view"],
                dry_run=chosen["dry_run"],
                progress=lambda done, total: meter.update(done, total, "offsets read again"),
            )


_CHOICE = [
    option("--topic", type=str, default=None, help="Only those of this topic."),
    option("--view", type=str, default=None, help="Only those of this view."),
    option("--reason", type=click.Choice([reason.value for reason in Reason]), default=None, help="Only those for it."),
    option("--since", type=str, default=None, help="Only those written since then: 2026-01-31T12:00:00Z, 90m, 6h, 7d."),
]


def _choice(chosen: Mapping[str, Any]) -> reading.Choice:
    since = chosen["since"]
    return reading.Choice(
        chosen["topic"], chosen["view"], chosen["reason"], None if since is None else reading.parse_since(since)
    )


class dead_letters(_Command):
    """List the dead letters, counted by view, reason and field. With `faust --json` in a form for programs."""

    abstract: ClassVar[bool] = False

    options = [  # noqa: RUF012 - Faust declares it as an attribute of instances
        *_CHOICE,
        option("--newest", type=click.IntRange(min=0), default=0, help="Show so many of the newest, one by one, too."),
    ]

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command."""
        self.finish(self._listed)

    def _listed(self) -> Mapping[str, object] | str:
        with progress.shown("dead letters") as meter:
            found = reading.survey(
                self.config,
                _choice(self.kwargs),
                self.kwargs["newest"],
                progress=lambda done, total: meter.update(done, total, "read"),
            )
        if self.state.json:
            return _survey_json(found)
        counts = [
            [view, reason, field, str(group.count), _time(group.first_ms), _time(group.last_ms), _shown(group.example)]
            for (view, reason, field), group in sorted(found.groups.items(), key=lambda item: -item[1].count)
        ]
        heads = ["view", "reason", "field", "letters", "first", "last", "example"]
        tables = [self.tabulate(counts, heads, title="dead letters", wrap_last_row=False)] if counts else []
        if found.newest:
            rows = [
                [f"{_origin(letter)}", letter.view, letter.reason, _time(letter.written_ms), _shown(letter.message)]
                for letter in found.newest
            ]
            heads = ["record", "view", "reason", "written", "message"]
            tables.append(self.tabulate(rows, heads, title="newest", wrap_last_row=False))
        notes = [f"{found.count} letters"]
        if found.foreign:
            notes.append(f"{found.foreign} records that are no letters of ours")
        return "\n".join([*tables, ", ".join(notes)])


class replay(_Command):
    """Try dead letters once more: what is accepted now goes to both stores. Nothing is produced to any topic."""

    abstract: ClassVar[bool] = False

    options = [  # noqa: RUF012 - Faust declares it as an attribute of instances
        *_CHOICE,
        option("--dry-run", is_flag=True, help="Count what would become of them, and write nothing."),
    ]

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command."""
        self.finish(self._replayed)

    def _replayed(self) -> Mapping[str, object]:
        with progress.shown("replay") as meter:
            return replaying.replay(
                self.config,
                _choice(self.kwargs),
                dry_run=self.kwargs["dry_run"],
                progress=lambda done, total: meter.update(done, total, "letters read"),
            )


class verify(_Command):
    """Prove on your own broker and stores, in a project of its own, that no event is lost, doubled or older."""

    abstract: ClassVar[bool] = False

    options = [  # noqa: RUF012 - Faust declares it as an attribute of instances
        option(
            "--minutes", type=click.FloatRange(min=0, min_open=True), required=True, help="How long to send events."
        ),
        option("--kill", is_flag=True, help="Kill -9 and freeze the workers at random meanwhile."),
        option(
            "--rate",
            type=click.FloatRange(min=0, min_open=True),
            default=500.0,
            show_default=True,
            help="Events a second.",
        ),
        option("--workers", type=click.IntRange(1, 16), default=2, show_default=True, help="How many workers."),
        option("--seed", type=click.IntRange(min=0), default=None, help="The same seed: the same events and kills."),
        option("--yes", is_flag=True, help="Use a broker that is not on this machine."),
    ]

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command."""
        chosen = self.kwargs
        plan = verifying.Plan(
            seconds=60 * chosen["minutes"],
            rate=chosen["rate"],
            workers=chosen["workers"],
            kill=chosen["kill"],
            seed=secrets.randbelow(1_000_000) if chosen["seed"] is None else chosen["seed"],
        )
        self.finish(lambda: verifying.verify(self.config, plan, anywhere=chosen["yes"]))


def _survey_json(found: reading.Survey) -> Mapping[str, object]:
    groups = [
        {
            "view": view,
            "reason": reason,
            "field": field,
            "letters": group.count,
            "first": _time(group.first_ms),
            "last": _time(group.last_ms),
            "example": group.example,
        }
        for (view, reason, field), group in sorted(found.groups.items())
    ]
    newest = [
        {
            "record": _origin(letter),
            "view": letter.view,
            "reason": letter.reason,
            "field": letter.field,
            "message": letter.message,
            "written": _time(letter.written_ms),
        }
        for letter in found.newest
    ]
    return {"letters": found.count, "foreign": found.foreign, "groups": groups, "newest": newest}


def _origin(letter: reading.StoredLetter) -> str:
    return f"{letter.topic}[{letter.origin_partition}]@{letter.origin_offset}"


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _shown(text: str) -> str:
    """Text of hostile origin for a terminal: no control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
