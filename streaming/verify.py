"""A verification on the user's own broker and stores: known events, real workers that are killed, and a proof.

It makes a project, topics and folders of its own, sends events there while workers run, and then shows that each is in
the offline store exactly once, each bad one among the dead letters, and the newest of each key online.
"""

from __future__ import annotations

import json
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from headrace.chains import StreamLedger
from headrace.progress import Meter, is_installed, shown
from streaming import emit as emitting
from streaming.broker import Broker
from streaming.settings import StreamConfig
from streaming.verify_load import Load, Sent
from streaming.verify_place import PARTITIONS, Place, build, refuse, remove
from streaming.verify_proof import Fault, Proof, prove
from streaming.verify_workers import Fleet

KEYS = 1000
BAD_FRACTION, LATE_FRACTION, DUPLICATE_FRACTION = 0.03, 0.1, 0.02

_TICK_S = 0.05
_PROGRESS_S = 5.0
_SHOWN_S = 0.5
_STUCK_S = 120.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Plan:
    """What a verification does.

    Attributes:
        seconds: how long events are sent.
        rate: events a second.
        workers: how many worker processes.
        kill: whether they are killed and frozen meanwhile.
        seed: the same seed makes the same events, but for their times, and the same choices of whom to kill when.
    """

    seconds: float
    rate: float
    workers: int
    kill: bool
    seed: int


@dataclass(frozen=True)
class Run:
    """What happened until everything was stored, or nothing moved any more."""

    sent: Sent
    kills: int
    freezes: int
    freshness: Mapping[str, Mapping[str, float]]


def verify(config: StreamConfig, plan: Plan, *, anywhere: bool) -> Mapping[str, object]:
    """Verify. Blocking; of the main thread. Tells its progress on stderr, and removes what it made, whatever happens.

    Returns:
        Counts, freshness, and `ok`: whether all is right and nothing was left behind.

    Raises:
        ConfigError: a broker elsewhere without `anywhere`, an online store that promises nothing, or a name is taken.
        HeadraceError: it could not be carried through.
        KeyboardInterrupt: a signal asked to end; everything was removed.
    """
    place = Place.of(config, secrets.token_hex(6))
    emitting.require_near(config, place.topic, anywhere=anywhere)
    for what, name in place.names(config).items():
        _say(f"{what + ':':16}{name}")
    broker = Broker(config)
    leftovers = refuse(place, config, broker)
    broker.close()
    if leftovers:
        _say(f"another one runs or was killed: there is {', '.join(leftovers)}; docs/how-to/verify.md tells what to do")
    with _signals() as done:
        keep = True
        try:
            own = build(place, config)
            run = drive(place, own, plan)
            with shown("verify") as meter:
                meter.say("comparing what was sent with both stores")
                proof = prove(own, run.sent)
            keep = not proof.is_right
        except KeyboardInterrupt:
            keep = False
            raise
        finally:
            done()
            left = _clean(place, config, keep=keep)
    result = _result(place, plan, run, proof, left)
    if keep:
        (place.home / "verdict.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    _say(_table(result))
    return result


def drive(place: Place, config: StreamConfig, plan: Plan) -> Run:
    """Send events while workers run, and wait until these have stored all. No worker runs afterwards.

    Args:
        config: of the repository that was built there.

    Raises:
        HeadraceError: the broker does not take events, or a worker ends by itself.
    """
    events = emitting.Plan(
        rate=plan.rate,
        count=None,
        bad_fraction=BAD_FRACTION,
        late_fraction=LATE_FRACTION,
        duplicate_fraction=DUPLICATE_FRACTION,
        seed=plan.seed,
        keys=KEYS,
    )
    load = Load(config, events, PARTITIONS)
    with (
        shown("verify") as meter,
        Fleet(place, config, plan.workers, plan.seed if plan.kill else None) as fleet,
    ):
        meter.say("starting the workers")
        _say(f"starting {plan.workers} workers (seed {plan.seed})")
        fleet.start()
        begun_s = time.monotonic()
        tell = _Progress(config, load, fleet, plan, meter)
        while (elapsed_s := time.monotonic() - begun_s) < plan.seconds:
            load.send_due(elapsed_s)
            fleet.check()
            fleet.intervene()
            tell.now_and_then(f"{plan.seconds - elapsed_s:.0f} s left")
            time.sleep(_TICK_S)
        load.send_due(plan.seconds)
        sent = load.finish()
        fleet.go_on()
        _drain(fleet, tell)
        fleet.look()
        fleet.stop()
    return Run(sent, fleet.kills, fleet.freezes, fleet.freshness)


class _Progress:
    """What is told while it runs."""

    def __init__(self, config: StreamConfig, load: Load, fleet: Fleet, plan: Plan, meter: Meter) -> None:
        topic, (view,) = next(iter(config.views.items()))
        self._ledgers = {number: StreamLedger(view.contract, topic, number) for number in range(PARTITIONS)}
        self._load, self._fleet, self._plan, self._meter = load, fleet, plan, meter
        self._total = round(plan.seconds * plan.rate * (1 + DUPLICATE_FRACTION))
        self._interval_s = _SHOWN_S if is_installed() else _PROGRESS_S
        self._next_s = time.monotonic() + self._interval_s

    def lag(self) -> int:
        """How many offsets the broker has taken that no ledger has."""
        return sum(max(0, end - self._ledgers[number].end().end) for number, end in self._load.ends.items())

    def now_and_then(self, what: str) -> None:
        """Tell, if it is time to: at a terminal in one line that is kept up to date, else in a new one each time."""
        if time.monotonic() < self._next_s:
            return
        self._fleet.look()
        interventions = f", {self._fleet.kills} kills, {self._fleet.freezes} freezes" if self._plan.kill else ""
        facts = f"{self.lag():,} not stored yet{interventions}"
        if is_installed():
            self._meter.update(self._load.taken, max(self._total, self._load.taken + 1), "events sent", facts)
        else:
            _say(f"{self._load.taken:,} events sent, {facts}, {what}")
        self._next_s = time.monotonic() + self._interval_s


def _drain(fleet: Fleet, tell: _Progress) -> None:
    """Wait until every ledger ends where its log does, or nothing moves: the proof will say what is missing."""
    lag, moved_s = tell.lag(), time.monotonic()
    while lag > 0 and time.monotonic() - moved_s < _STUCK_S:
        fleet.check()
        tell.now_and_then("draining")
        time.sleep(0.2)
        before, lag = lag, tell.lag()
        if lag != before:
            moved_s = time.monotonic()


@contextmanager
def _signals() -> Iterator[Any]:
    """Let signals that end a program raise KeyboardInterrupt here; yields what makes them be ignored from then on."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def ignore() -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def interrupt(number: int, frame: object) -> NoReturn:
        del frame
        ignore()  # a second one would interrupt the ending of the workers
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in _SIGNALS:
        signal.signal(number, interrupt)
    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clean(place: Place, config: StreamConfig, *, keep: bool) -> list[str]:
    """Remove everything, but for the evidence of what went wrong; say what stays."""
    _say("removing the topics, the group, the online rows and the folders")
    left = remove(place, config, keep=keep)
    for what in left:
        _say(f"could not be removed: {what}; docs/how-to/verify.md says how")
    if keep:
        _say(f"kept to look into: {place.offline} (offline folder), {place.logs} (logs); remove them afterwards")
    return left


def _result(place: Place, plan: Plan, run: Run, proof: Proof, left: list[str]) -> Mapping[str, object]:
    return {
        "ok": proof.is_right and not left,
        "project": place.project,
        "seed": plan.seed,
        "seconds": plan.seconds,
        "sent": run.sent.count,
        "accepted": proof.accepted,
        "rejected": proof.rejected,
        "skipped": proof.skipped,
        "letters": proof.letters,
        "keys": proof.keys,
        "segments": proof.segments,
        **{str(kind): len(whom) for kind, whom in proof.faults.items()},
        "examples": {str(kind): shown for kind, shown in proof.examples.items() if shown},
        "kills": run.kills,
        "freezes": run.freezes,
        "freshness": run.freshness,
        "left": left,
    }


def _table(result: Mapping[str, Any]) -> str:
    """The verdict for people."""
    lines = [("events sent", f"{result['sent']:,}")]
    lines += [(name, f"{result[name]:,}") for name in ("accepted", "rejected", "skipped")]
    lines += [("dead letters", f"{result['letters']:,}"), ("keys online", f"{result['keys']:,}")]
    lines += [("kills, freezes", f"{result['kills']}, {result['freezes']}")]
    lines += [
        (f"worst freshness {store}", f"p50 {one.get('p50_s', 0):.3f} s, p99 {one.get('p99_s', 0):.3f} s")
        for store, one in sorted(result["freshness"].items())
    ]
    lines += [(str(kind), f"{result[str(kind)]:,}") for kind in Fault]
    lines += [("", shown) for examples in result["examples"].values() for shown in examples]
    lines += [("left behind", what) for what in result["left"]]
    lines += [("verdict", "all is right" if result["ok"] else "WRONG")]
    return "\n".join(["", *(f"  {name:24}{value}" for name, value in lines)])


def _say(text: str) -> None:
    sys.stderr.write(f"headrace verify: {text}\n")
    sys.stderr.flush()
