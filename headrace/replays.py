"""The replay chain of a view: dead letters of a topic that were accepted later, each once.

A letter's origin is the place of its record: topic id (an epoch of the ledger), partition, offset. Rows keep that place
in the total order, so an old event that is accepted late does not overtake a newer one. Each segment's footer names the
origins of its rows in the order of the rows; merges keep them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.chains import Standing, StreamLedger, append
from headrace.contract import ViewContract
from headrace.encode import Origin, Tails, stream_tails
from headrace.errors import LedgerError, LostRaceError
from headrace.folder import Folder
from headrace.place import File
from headrace.segments import (
    REPLAY,
    Footer,
    Offsets,
    encode_ranges,
    new_append_id,
    read_footer,
    read_origins,
    time_bounds,
    writer_id,
)


@dataclass(frozen=True)
class Origins:
    """Where rows come from, aligned with them: rows of one epoch and partition stand together, offsets ascending."""

    epochs: npt.NDArray[np.int64]
    partitions: npt.NDArray[np.int64]
    offsets: Offsets

    def __len__(self) -> int:
        return len(self.offsets)

    def take(self, rows: npt.NDArray[np.int64]) -> Origins:
        """These rows alone."""
        return Origins(self.epochs[rows], self.partitions[rows], self.offsets[rows])

    def order(self) -> npt.NDArray[np.int64]:
        """The rows in the order in which a segment holds them."""
        return np.lexsort((self.offsets, self.partitions, self.epochs)).astype(np.int64)

    def groups(self) -> list[tuple[Origin, npt.NDArray[np.int64]]]:
        """One partition in one epoch each, with its rows."""
        places = np.column_stack((self.epochs, self.partitions))
        found = []
        for epoch, partition in np.unique(places, axis=0).tolist():
            rows = np.flatnonzero((self.epochs == epoch) & (self.partitions == partition))
            found.append((Origin(epoch, partition, self.offsets[rows]), rows))
        return found

    def tails(self) -> Tails:
        """Their places in the total order."""
        tails = np.zeros((len(self), 17), dtype=np.uint8)
        for origin, rows in self.groups():
            tails[rows] = stream_tails(origin)
        return tails


class ReplayLedger:
    """What one view has taken of the dead letters of one topic. Two of them may run: of two appends one loses."""

    def __init__(self, contract: ViewContract, topic: str) -> None:
        self._contract = contract
        self._topic = topic
        self._folder = Folder.of(contract)
        self._chain = f"{REPLAY}{topic}"
        self._ledgers: dict[int, StreamLedger] = {}
        self._epochs: dict[int, Mapping[str | None, int]] = {}
        self._taken: dict[tuple[int, int], Offsets] = {}
        self._has_read = False
        self.end = 0

    def catch_up(self) -> list[File]:
        """Read what the chain has gained since the last call; the first time, all of it.

        Returns:
            The segments that may not be online yet: what was gained; the first time the newest alone, because whoever
            appends has first seen to it that what lies before is online.
        """
        is_first, self._has_read = not self._has_read, True

        def read() -> list[tuple[File, Footer]]:
            valid = self._folder.chain(self._chain).valid
            pairs = [(path, read_footer(path)) for path in map(self._folder.path_of, valid)]
            return [(path, footer) for path, footer in pairs if footer.next > self.end]

        gained = self._folder.settled(read)
        for _, footer in gained:
            self._note(footer)
            self.end = footer.next
        paths = [path for path, footer in gained if footer.min_us is not None]
        return paths[-1:] if is_first else paths

    def epoch(self, partition: int, topic_id: str | None) -> int | None:
        """The epoch of a partition's ledger that is of a topic id; None where there is none."""
        if partition not in self._epochs:
            self._epochs[partition] = self._ledger(partition).epochs()
        return self._epochs[partition].get(topic_id)

    def standings(self, origins: Origins) -> list[Standing]:
        """What the view has of each. Only what is `OPEN` may be appended."""
        found = [Standing.OPEN] * len(origins)
        for origin, rows in origins.groups():
            taken = np.isin(origin.offsets, self.taken(origin.epoch, origin.partition))
            fates = self._ledger(origin.partition).standings(origin.epoch, origin.offsets)
            for row, is_taken, fate in zip(rows.tolist(), taken.tolist(), fates, strict=True):
                found[row] = Standing.REPLAYED if is_taken else fate
        return found

    def taken(self, epoch: int, partition: int) -> Offsets:
        """The offsets of a partition whose letters were taken, as far as it was read; ascending."""
        return self._taken.get((epoch, partition), np.empty(0, dtype=np.int64))

    def append(self, table: pa.Table, origins: Origins, *, transform_hash: str | None = None) -> File:
        """Take letters: extend the chain by their rows. Atomic and durable.

        Args:
            table: the rows, in the contract's schema and in the order of `origins`.
            origins: in `Origins.order`, each `OPEN` at the last `catch_up`.

        Raises:
            LostRaceError: another replay was first. Nothing was appended; catch up, and ask for the standings again.
            LedgerError: the chain lost its end since it was read.
        """
        low, high = time_bounds(table, self._contract.timestamp_field)
        note = Footer(
            next=self.end + len(origins),
            min_us=low,
            max_us=high,
            transforms=() if transform_hash is None else (transform_hash,),
            writer=writer_id(),
            append=new_append_id(),
            extra={
                "origins": [
                    [origin.epoch, origin.partition, encode_ranges(origin.offsets).decode()]
                    for origin, _ in origins.groups()
                ]
            },
        )
        try:
            path = append(self._folder, self._chain, self.end, table, note)
        except LostRaceError as lost:
            if lost.end < self.end:  # to catch up would never end
                msg = f"chain `{self._chain}` ended at {self.end}, and ends at {lost.end} now; put its files back"
                raise LedgerError(msg) from lost
            raise
        self._note(note)
        self.end = note.next
        return path

    def _note(self, footer: Footer) -> None:
        for origin in read_origins(footer):
            key = origin[:2]
            self._taken[key] = np.union1d(self.taken(*key), origin[2])

    def _ledger(self, partition: int) -> StreamLedger:
        if partition not in self._ledgers:
            self._ledgers[partition] = StreamLedger(self._contract, self._topic, partition)
        return self._ledgers[partition]
