"""Faust commands of the stream: `faust -A streaming emit ...` and `faust -A streaming start ...`.

They only read options and print; what they do is in `streaming.emit` and `streaming.start`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

import click
from faust.cli.base import AppCommand, option

from headrace.errors import HeadraceError
from streaming import emit as emitting
from streaming import start as starting
from streaming.settings import StreamConfig


class _Command(AppCommand):
    """A command that runs to its end and prints one line of JSON, or one line of what is wrong."""

    abstract: ClassVar[bool] = True

    @property
    def config(self) -> StreamConfig:
        """Settings and registry, as the app read them."""
        found: StreamConfig = self.app.config  # type: ignore[attr-defined]
        return found

    def finish(self, work: Callable[[], Mapping[str, object]]) -> NoReturn:
        """Do the work, print what it returns, exit."""
        try:
            result = work()
        except HeadraceError as error:
            sys.stderr.write(f"headrace: {error}\n")
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        sys.stdout.write(json.dumps(result) + "\n")
        raise SystemExit(0)


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
        option("--at", type=str, default=None, help="earliest, latest, group, or a time such as 2026-01-31T12:00:00Z."),
    ]

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command."""
        chosen = self.kwargs
        if chosen["new_epoch"] == (chosen["at"] is not None):
            raise click.UsageError("give either --new-epoch or --at")
        if chosen["new_epoch"]:
            self.finish(lambda: starting.new_epoch(self.config, chosen["topic"]))
        self.finish(lambda: starting.begin(self.config, chosen["topic"], chosen["at"]))
