"""Replay: dead letters go once more through decoding, rules and both stores. Nothing is produced to any topic.

A letter is taken once per view and origin, whatever is killed or runs twice: the replay chain is the ledger of that
(see `headrace.replays`). Here the append comes first and the online write after it, unlike in the stream: to an audit a
value online that no file accounts for is a fault, whereas a row that is offline alone is pending. What a killed replay
appended, the next one brings online before it goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from feast import FeatureStore

from headrace.chains import Standing
from headrace.conform import Rows
from headrace.errors import LostRaceError
from headrace.faults import reached
from headrace.materialize import apply_newest
from headrace.online import write_online
from headrace.replays import Origins, ReplayLedger
from headrace.repository import open_store
from streaming.formats import decoder_of, patiently
from streaming.judgement import judge
from streaming.letters import Choice, StoredLetter, read
from streaming.settings import StreamConfig, View, schema_registry

CUT = "cut"
OTHER_TOPIC = "other_topic_id"
UNSERVED = "unserved_view"


@dataclass
class Outcome:
    """What became of the letters of one view. Each letter that was looked at is counted once.

    Attributes:
        replayed: rows that are in both stores now; in a dry run those that would be.
        skipped: that the transformation left out.
        rejected: turned away once more, by reason.
        left: not tried, by what stands against it: it is in the stores already (`accepted`, `replayed`), the stream has
            not committed its offset (`uncommitted`), retention went over it (`retained`), its bytes are not all there
            (`cut`), or it is of a topic that the ledger does not know (`other_topic_id`).
    """

    replayed: int = 0
    skipped: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, object]:
        """For people and programs."""
        return {
            "replayed": self.replayed,
            "skipped": self.skipped,
            "rejected": dict(sorted(self.rejected.items())),
            "left": dict(sorted(self.left.items())),
        }


def replay(
    config: StreamConfig,
    choice: Choice,
    *,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[str, object]:
    """Try the letters that are there now once more. May be killed, repeated, and run beside workers and replays.

    Args:
        dry_run: count what would become of them; write nothing.
        progress: called with records read and records to read, after each chunk.

    Returns:
        `dry_run`, the outcome by view, and how many letters were of views that are not served here.

    Raises:
        ConfigError: no view has the topic.
        TransientError: the broker or a store does not answer; what was done stays, run again.
    """
    store = open_store(config.settings.feature_repo)
    replays: dict[tuple[str, str], _ViewReplay] = {}
    outcomes: dict[str, Outcome] = {}
    unserved = 0
    for letters, _ in read(config, choice, progress):
        mine: dict[tuple[str, str], list[StoredLetter]] = {}
        for letter in letters:
            mine.setdefault((letter.topic, letter.view), []).append(letter)
        for (topic, name), own in mine.items():
            view = next((v for v in config.views.get(topic, ()) if v.contract.name == name), None)
            if view is None:
                unserved += len(own)
                continue
            outcome = outcomes.setdefault(name, Outcome())
            if (topic, name) not in replays:
                replays[topic, name] = _ViewReplay(config, store, view, topic, outcome, dry_run=dry_run)
            replays[topic, name].take(own)
    views = {name: outcomes[name].as_json() for name in sorted(outcomes)}
    return {"dry_run": dry_run, "views": views, UNSERVED: unserved}


class _ViewReplay:
    """The letters of one topic for one view."""

    def __init__(
        self, config: StreamConfig, store: FeatureStore, view: View, topic: str, outcome: Outcome, *, dry_run: bool
    ) -> None:
        self._view, self._store, self._outcome, self._dry_run = view, store, outcome, dry_run
        self._max_skew_seconds = config.settings.max_skew_seconds
        self._decoder = patiently(decoder_of(view.contract, schema_registry(config.settings)))
        self._ledger = ReplayLedger(view.contract, topic)
        self._seen: set[tuple[int, int, int]] = set()
        self._catch_up()

    def take(self, letters: list[StoredLetter]) -> None:
        """Try some letters, and bring what is accepted to both stores."""
        whole = [letter for letter in letters if self._is_whole(letter)]
        origins = self._origins(whole)
        rows = self._open(origins)
        origins = origins.take(rows)
        judged = judge(self._view, self._decoder, [whole[row].value for row in rows], self._max_skew_seconds)
        self._outcome.skipped += judged.skipped
        self._outcome.rejected.update(reject.reason.value for reject in judged.rejects)
        accepted = origins.take(judged.rows)
        order = accepted.order()
        self._bring(judged.table.take(pa.array(order)), accepted.take(order))

    def _is_whole(self, letter: StoredLetter) -> bool:
        """Whether it can be tried; counts what stands against it. A letter that was written twice is one."""
        epoch = self._ledger.epoch(letter.origin_partition, letter.topic_id)
        if epoch is None:
            self._outcome.left[OTHER_TOPIC] += 1
            return False
        place = (epoch, letter.origin_partition, letter.origin_offset)
        if place in self._seen:
            return False
        self._seen.add(place)
        if letter.is_cut:
            self._outcome.left[CUT] += 1
        return not letter.is_cut

    def _origins(self, letters: list[StoredLetter]) -> Origins:
        epochs = [self._ledger.epoch(letter.origin_partition, letter.topic_id) for letter in letters]
        return Origins(
            np.array(epochs, dtype=np.int64),
            np.array([letter.origin_partition for letter in letters], dtype=np.int64),
            np.array([letter.origin_offset for letter in letters], dtype=np.int64),
        )

    def _open(self, origins: Origins) -> Rows:
        """The rows that nothing stands against; the others are counted."""
        standings = self._ledger.standings(origins)
        self._outcome.left.update(standing.value for standing in standings if standing is not Standing.OPEN)
        return np.flatnonzero([standing is Standing.OPEN for standing in standings]).astype(np.int64)

    def _bring(self, table: pa.Table, origins: Origins) -> None:
        """Append and write online; who loses the race looks again at what is left."""
        contract, transform = self._view.contract, self._view.transform
        while len(origins) and not self._dry_run:
            try:
                self._ledger.append(table, origins, transform_hash=transform.hash if transform is not None else None)
            except LostRaceError:
                self._catch_up()
                rows = self._open(origins)
                table, origins = table.take(pa.array(rows)), origins.take(rows)
                continue
            reached("replay.1.appended")
            write_online(self._store, contract, table, tails=origins.tails())
            reached("replay.2.online")
            break
        self._outcome.replayed += len(origins)

    def _catch_up(self) -> None:
        """Bring online what another replay appended and may have been killed before it could write."""
        gained = self._ledger.catch_up()
        if not self._dry_run:
            apply_newest(self._store, self._view.contract, gained)
