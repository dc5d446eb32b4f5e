"""Mend just the keys that an audit finds wrong, each by compare-and-set: only if online is exactly what was looked at.

Newest-wins alone could never take a wrong newer value back. What a wrong value turned away was never stored either, so
a repair sets the mark back to what was offline when it began, before its first write and again after its last, and then
materializes what arrived since. In the end the newest is online, whoever writes meanwhile.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from feast import FeatureStore

from headrace.audit import BACKWARD, EXAMPLES, FORWARD, Audit, Cut, Kind, Verdicts, auditable_store, note
from headrace.contract import ViewContract
from headrace.encode import UNTIL_KIND, EncodedRows, encode, encode_each
from headrace.faults import reached
from headrace.materialize import Materialized, Progress, holdings, materialize_arrived, set_back
from headrace.online import expect_applied
from headrace.scan import newest, reading


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        audit: what was found, as by `audit`; where a day was replaced meanwhile, what was found in the last turn.
        mended: how many keys of each kind were set to the newest offline row, or removed where there is none, in all.
        moved: how many were written by somebody else between look and touch, and left.
        materialized: what was applied afterwards.
    """

    audit: Audit
    mended: Counter[Kind]
    moved: int
    materialized: Materialized


def repair(
    store: FeatureStore,
    contract: ViewContract,
    *,
    backwards: bool = False,
    examples: int = EXAMPLES,
    progress: Progress | None = None,
) -> Repair:
    """Audit, and mend what is missing online, stale or different.

    Safe beside a stream, materializations and other repairs. After a crash run it again: each step does no harm when
    repeated. `audit` is the dry run.

    Args:
        backwards: also take back what is ahead, and remove what is missing offline. Values that were only ever written
            online are lost by that.
        progress: called with keys done and keys in all, after each chunk.

    Raises:
        ConfigError: the online store is not one of ours.
        TransientError: the view must not be written yet (`headrace.online.unapplied`).
    """
    expect_applied(store, contract)
    kinds = (*FORWARD, *BACKWARD) if backwards else FORWARD
    begun = holdings(contract)
    mended: Counter[Kind] = Counter()
    moved = 0

    def mend(cut: Cut) -> Audit:
        nonlocal moved
        result = Audit(contract.name, cut.at)
        for verdicts in cut.judge(progress=progress):
            note(result, store.config, contract, verdicts, examples)
            wrong = [i for i, kind in enumerate(verdicts.kinds) if kind in kinds]
            if not wrong:
                continue
            if not mended and not moved:
                set_back(store, contract, begun)
                reached("repair.1.mark set back")
            done = _mend(store, contract, verdicts, wrong)
            reached("repair.2.chunk mended")
            mended.update(verdicts.kinds[i] for i, is_done in zip(wrong, done, strict=True) if is_done)
            moved += done.count(False)
        return result

    result = reading(lambda: Cut(store, contract), lambda cut: cut.holdings.all_paths, mend)
    if mended:
        set_back(store, contract, begun)
        reached("repair.3.mark set back again")
    return Repair(result, mended, moved, materialize_arrived(store, contract))


def withdraw(store: FeatureStore, contract: ViewContract, rows: pa.Table) -> Counter[Kind]:
    """Take rows back that a day no longer has: where one of them is what is online, the newest offline row replaces it.

    A row is known by key, event and created time: what it was encoded to changes with the view.

    Args:
        rows: of no stream; the columns of their keys and times, in the types of the contract's schema.

    Returns:
        How many keys were replaced (`Kind.AHEAD`) and how many removed (`Kind.EXTRA`).

    Raises:
        TransientError: the view must not be written yet (`headrace.online.unapplied`).
    """
    expect_applied(store, contract)
    target = auditable_store(store)
    gone = encode_each(contract, _without_values(contract, rows))
    withdrawn = {(key, order[:UNTIL_KIND]) for key, order in zip(gone.keys, gone.order, strict=True)}
    stored = target.read_stored(store.config, contract.feature_view, sorted(set(gone.keys)))
    orders = list(zip(stored.keys, stored.order, strict=True))
    hit = [i for i, (key, order) in enumerate(orders) if order is not None and (key, order[:UNTIL_KIND]) in withdrawn]
    taken: Counter[Kind] = Counter()
    if not hit:
        return taken
    seen = stored.take(np.array(hit, dtype=np.int64))
    cut, latest = reading(
        lambda: Cut(store, contract),
        lambda cut: cut.holdings.all_paths,
        lambda cut: (cut, _latest(contract, cut, rows)),
    )
    place = {key: i for i, key in enumerate(latest.keys)}
    others = [i for i, key in enumerate(seen.keys) if key in place and latest.order[place[key]] != seen.order[i]]
    kept = np.array(others, dtype=np.int64)
    lost = np.array([i for i, key in enumerate(seen.keys) if key not in place], dtype=np.int64)
    if not len(kept) and not len(lost):
        return taken
    new = latest.take(np.array([place[seen.keys[i]] for i in kept], dtype=np.int64))
    set_back(store, contract, cut.holdings)
    reached("withdraw.1.mark set back")
    taken[Kind.AHEAD] += sum(target.replace_exact(store.config, contract.feature_view, seen.take(kept), new))
    reached("withdraw.2.replaced")
    taken[Kind.EXTRA] += sum(target.replace_exact(store.config, contract.feature_view, seen.take(lost), None))
    reached("withdraw.3.removed")
    set_back(store, contract, cut.holdings)
    materialize_arrived(store, contract)
    return taken


def _mend(store: FeatureStore, contract: ViewContract, verdicts: Verdicts, wrong: list[int]) -> list[bool]:
    """Set these keys to their newest offline row, or remove them where there is none."""
    target = auditable_store(store)
    rows = np.array(wrong, dtype=np.int64)
    latest = None if verdicts.latest is None else verdicts.latest.take(rows)
    return target.replace_exact(store.config, contract.feature_view, verdicts.stored.take(rows), latest)


def _without_values(contract: ViewContract, rows: pa.Table) -> pa.Table:
    """The rows in the contract's schema, all features null."""
    nulls = {name: pa.nulls(rows.num_rows, contract.schema.field(name).type) for name in contract.features}
    columns = [nulls[name] if name in nulls else rows.column(name) for name in contract.schema.names]
    return pa.Table.from_arrays(columns, schema=contract.schema)


def _latest(contract: ViewContract, cut: Cut, rows: pa.Table) -> EncodedRows:
    """The newest offline row of each key of some rows that has one."""
    keys = rows.select(list(contract.join_keys))
    with newest(contract, cut.holdings.all_paths, memory_limit=cut.limit, keys=keys) as found:
        chunks = list(found)
    tables = [table for table, _ in chunks] or [contract.schema.empty_table()]
    tails = np.concatenate([tails for _, tails in chunks]) if chunks else np.empty((0, 17), dtype=np.uint8)
    return encode(contract, pa.concat_tables(tables), tails)
