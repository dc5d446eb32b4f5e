"""Speed and memory of both stores: our plug-ins beside Feast's own, on this machine, in the same run.

    python -m benchmarks.stores [--only materialize-redis ...] [--runs 3] [--scale 1.0]
        [--write docs/explanation/benchmarks.md]

Each measurement is a process of its own that prepares, and then times the operation alone (see `benchmarks.measure`);
ours and stock take turns. Figures are medians. What is stored and retrieved is compared: wrong data end the run.
`--scale` makes every data set smaller, to try things; the bounds are meant for 1.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import redis

from benchmarks.command import Asked, command
from benchmarks.measure import (
    GIB,
    MILLION,
    Answer,
    MeasureError,
    Worker,
    median_of,
    milliseconds,
    redis_program,
    redis_version,
    seconds,
    short,
    table,
    words_of,
)
from tests.servers import Valkey

OURS, STOCK, SPARK = "ours", "stock", "spark"
NARROW, WIDE = 3, 50
STOCK_LIMIT_S = 90.0
"""Once the runs of stock in one row have taken this long, it runs no more: the whole must stay under half an hour."""
OUR_APPENDS, STOCK_APPENDS = 30, 5
BLOCKS, CALLS_A_BLOCK, REQUESTS_A_BLOCK = 10, 100, 500
CLIENTS = 8
"""That ask `feast serve` at once."""
NOISE = 1.05
"""Serving counts as not slower than stock up to this."""
NOT_SLOWER = "not slower (5 % of noise)"
STORES = {"redis": "Redis", "sqlite": "SQLite"}
HEADS = ("what", "ours", "stock Feast", "ratio", "bound", "met", "peak memory: ours, stock", "runs: ours, stock")
PACKAGES = ("feast", "duckdb", "pyarrow", "redis", "hiredis")


@dataclass(frozen=True)
class Row:
    """One row of the table, formatted.

    Attributes:
        bound: what is asked of it.
        met: whether it holds; None where there is no bound.
        memory: peak memory of ours and of stock.
        runs: how many of ours and of stock the medians are of.
    """

    what: str
    ours: str
    stock: str
    ratio: str
    bound: str
    met: bool | None
    memory: str
    runs: str

    def cells(self) -> tuple[str, ...]:
        """The row as the table shows it."""
        met = words_of(self.met)
        return (self.what, self.ours, self.stock, self.ratio, self.bound, met, self.memory, self.runs)


class Bench:
    """Where the data are, how large they are to be, and how often things run.

    Args:
        folder: for everything; the caller removes it.
        runs: of each measurement.
        scale: of the data sets.
    """

    def __init__(self, folder: Path, valkey: Valkey, runs: int, scale: float) -> None:
        self.folder = folder
        self.runs = runs
        self.scale = scale
        self._valkey = valkey
        self._begun = time.monotonic()
        self._places = 0

    def scaled(self, count: int) -> int:
        """A size at this scale."""
        return max(int(count * self.scale), 100)

    def place(self) -> Path:
        """A new folder."""
        self._places += 1
        path = self.folder / f"{self._places:04d}"
        path.mkdir()
        return path

    def fresh_online(self, kind: str, place: Path) -> str:
        """An empty online store: a new SQLite file, or the Valkey emptied."""
        if kind == "sqlite":
            return f"sqlite:{place / 'online.db'}"
        with redis.Redis.from_url(f"redis://{self._valkey.address}") as client:
            client.flushall()
        return f"redis:{self._valkey.address}"

    def worker(self, operation: str, **arguments: Any) -> Worker:
        """A process with an operation prepared."""
        return Worker("benchmarks.store_operations", operation, self.folder / "log.txt", **arguments)

    def once(self, operation: str, **arguments: Any) -> Answer:
        """One run of an operation in a process of its own."""
        with self.worker(operation, **arguments) as worker:
            return worker.run()

    def say(self, text: str) -> None:
        """Print progress."""
        print(f"[{time.monotonic() - self._begun:6.0f} s] {text}", flush=True)

    def history(self, rows: int, keys: int, features: int, pieces: int) -> History:
        """A data set, made when it is first asked for."""
        folder = self.folder / f"history-{rows}-{keys}-{features}"
        made = History(folder / "segments", folder / "rows.parquet", rows, keys, features)
        if not folder.exists():
            folder.mkdir()
            answer = self.once(
                "make-history",
                folder=str(self.place()),
                segments=str(made.segments),
                file=str(made.file),
                rows=rows,
                keys=keys,
                features=features,
                pieces=pieces,
            )
            self.say(f"made {rows:,} rows of {keys:,} keys and {features} features: {answer['seconds']:.1f} s")
        return made

    def take_turns(self, name: str, run: Callable[[str], Answer], sides: tuple[str, ...]) -> dict[str, list[Answer]]:
        """Run the sides in turn, each as often as asked for, stock only within its limit."""
        found: dict[str, list[Answer]] = {side: [] for side in sides}
        for number in range(self.runs):
            for side in sides:
                if side == STOCK and sum(answer["seconds"] for answer in found[side]) > STOCK_LIMIT_S:
                    continue
                answer = run(side)
                found[side].append(answer)
                memory = f"{answer['peak_bytes'] / GIB:.2f} GiB"
                self.say(f"{name}: run {number + 1} of {self.runs}, {side}: {answer['seconds']:.2f} s, peak {memory}")
        return found


class History:
    """A data set in both forms."""

    def __init__(self, segments: Path, file: Path, rows: int, keys: int, features: int) -> None:
        self.segments, self.file = segments, file
        self.rows, self.keys, self.features = rows, keys, features

    def of(self, side: str) -> str:
        """The form that a side reads."""
        return str(self.file if side == STOCK else self.segments)

    def copy(self, side: str, place: Path) -> str:
        """A form of its own, to be changed. Segments are never changed, so links do."""
        if side == STOCK:
            return str(shutil.copy(self.file, place / "rows.parquet"))
        target = place / "segments"
        target.mkdir()
        for file in self.segments.iterdir():
            os.link(file, target / file.name)
        return str(target)


def materialize(bench: Bench, name: str, *, kind: str, keys: int, features: int, bound: float) -> list[Row]:
    """Materialize a whole history of one row a key."""
    history = bench.history(bench.scaled(keys), bench.scaled(keys), features, pieces=10)

    def run(side: str) -> Answer:
        place = bench.place()
        answer = bench.once(
            "materialize",
            side=side,
            folder=str(place),
            history=history.of(side),
            features=features,
            online=bench.fresh_online(kind, place),
            truth=str(history.file),
        )
        shutil.rmtree(place)
        return answer

    found = bench.take_turns(name, run, (OURS, STOCK))
    ours, stock = (median_of(found[side], "seconds") for side in (OURS, STOCK))
    store = {"redis": "Redis", "sqlite": "SQLite"}[kind]
    return [
        Row(
            f"materialize {short(history.keys)} keys x {features} features, {store}",
            seconds(ours),
            seconds(stock),
            f"{stock / ours:.1f}x",
            f"≥ {bound:g}x",
            stock / ours >= bound,
            memory(found),
            runs(found),
        )
    ]


def retrieve(bench: Bench, name: str, *, entities: int, keys: int, sides: tuple[str, ...]) -> list[Row]:
    """Point-in-time retrieval against ten million rows."""
    history = bench.history(bench.scaled(10 * MILLION), bench.scaled(keys), NARROW, pieces=20)
    wanted = bench.scaled(entities)
    file = bench.place() / "entities.parquet"
    bench.once("make-entities", file=str(file), rows=wanted, keys=history.keys)

    def run(side: str) -> Answer:
        return bench.once(
            "retrieve",
            side=side,
            folder=str(bench.place()),
            history=history.of(side),
            features=NARROW,
            entities=str(file),
        )

    found = bench.take_turns(name, run, sides)
    if len({answer["digest"] for answers in found.values() for answer in answers}) != 1:
        raise MeasureError(f"{name}: the results differ")
    what = f"retrieval of {short(wanted)} entity rows from {short(history.rows)} rows of {short(history.keys)} keys"
    ours, peak = median_of(found[OURS], "seconds"), median_of(found[OURS], "peak_bytes")
    if SPARK in sides:
        spark = median_of(found[SPARK], "seconds")
        shown = seconds(spark), f"{spark / ours:.1f}x"
        return [
            Row(
                f"{what}: beside Spark `local[2]`",
                seconds(ours),
                *shown,
                "",
                None,
                memory({OURS: found[OURS]}),
                runs(found),
            )
        ]
    if STOCK not in sides:
        is_met = peak <= 8 * GIB
        return [Row(what, seconds(ours), "", "", "≤ 8 GiB", is_met, memory(found), runs(found))]
    stock, stock_peak = median_of(found[STOCK], "seconds"), median_of(found[STOCK], "peak_bytes")
    ratio = stock / ours
    return [
        Row(
            what,
            seconds(ours),
            seconds(stock),
            f"{ratio:.1f}x",
            "≥ 5x, memory no higher",
            ratio >= 5 and peak <= stock_peak,
            memory(found),
            runs(found),
        )
    ]


def append(bench: Bench, name: str) -> list[Row]:
    """Append 1,000 rows onto ten million, and onto one million."""
    large = bench.history(bench.scaled(10 * MILLION), bench.scaled(MILLION), NARROW, pieces=20)
    small = bench.history(bench.scaled(MILLION), bench.scaled(MILLION), NARROW, pieces=10)

    def measure(operation: str, form: str, times: int, **more: str) -> tuple[float, float]:
        places = [bench.place(), bench.place()]
        workers = [
            bench.worker(
                operation,
                folder=str(place),
                history=history.copy(form, place),
                features=NARROW,
                rows=1_000,
                **more,
            )
            for place, history in zip(places, (large, small), strict=True)
        ]
        with workers[0], workers[1]:
            for worker in workers:
                worker.run()  # the first one opens what stays open
            found: tuple[list[Answer], list[Answer]] = ([], [])
            for number in range(times):
                for index in (0, 1) if number % 2 else (1, 0):  # neither always comes first
                    found[index].append(workers[index].run())
        onto_large, onto_small = (median_of(answers, "seconds") for answers in found)
        bench.say(f"{name}: {operation}, {form}: {seconds(onto_large)} and {seconds(onto_small)}, {times} appends each")
        for place in places:
            shutil.rmtree(place)
        return onto_large, onto_small

    ours = measure("append", OURS, OUR_APPENDS, side=OURS)
    stock = measure("append", STOCK, STOCK_APPENDS, side=STOCK)
    ledger = measure("append-ledger", OURS, OUR_APPENDS)
    what = f"append of 1,000 rows, history of {short(large.rows)} / {short(small.rows)} rows"
    bound = "≤ 1.1x"

    def row(how: str, ours: tuple[float, float], stock: tuple[float, float] | None) -> Row:
        ratio = ours[0] / ours[1]
        return Row(
            f"{what}: {how}",
            f"{seconds(ours[0])} / {seconds(ours[1])}",
            "" if stock is None else f"{seconds(stock[0])} / {seconds(stock[1])}",
            f"{ratio:.2f}x" + ("" if stock is None else f" (stock {stock[0] / stock[1]:.1f}x)"),
            bound,
            ratio <= 1.1,
            "",
            f"{OUR_APPENDS}" + ("" if stock is None else f", {STOCK_APPENDS}"),
        )

    return [row("`write_to_offline_store`", ours, stock), row("the stream's ledger", ledger, None)]


def serve_online(bench: Bench, name: str, *, kind: str) -> list[Row]:
    """Calls of `get_online_features`: one process a side, which take turns by blocks of calls."""
    rows = []
    workers = online_workers(bench, "serve-online", kind)
    with workers[OURS], workers[STOCK]:
        for keys in (1, 100):
            blocks = take_blocks(workers, calls=CALLS_A_BLOCK, keys_a_call=keys)
            calls = {side: calls_of(found) for side, found in blocks.items()}
            ours, stock = median(calls[OURS]), median(calls[STOCK])
            bench.say(f"{name}, {keys} keys: ours {milliseconds(ours)}, stock {milliseconds(stock)}")
            rows.append(
                Row(
                    f"get_online_features, {counted_keys(keys)}, {STORES[kind]}",
                    milliseconds(ours),
                    milliseconds(stock),
                    f"{stock / ours:.2f}x",
                    NOT_SLOWER,
                    ours <= stock * NOISE,
                    "",
                    f"{len(calls[OURS]):,} calls, {len(calls[STOCK]):,} calls",
                )
            )
    return rows


def serve_http(bench: Bench, name: str, *, kind: str) -> list[Row]:
    """Requests to `feast serve`: one server a side, which take turns by blocks of requests."""
    rows = []
    workers = online_workers(bench, "serve-http", kind)
    with workers[OURS], workers[STOCK]:
        for keys in (1, 100):
            blocks = take_blocks(workers, requests=REQUESTS_A_BLOCK, clients=CLIENTS, keys_a_call=keys)
            rates = {side: REQUESTS_A_BLOCK / median_of(found, "seconds") for side, found in blocks.items()}
            shown = {side: f"{rates[side]:,.0f}/s, {tails(calls_of(found))}" for side, found in blocks.items()}
            bench.say(f"{name}, {keys} keys: ours {shown[OURS]}, stock {shown[STOCK]}")
            requests = f"{BLOCKS * REQUESTS_A_BLOCK:,} requests"
            rows.append(
                Row(
                    f"`feast serve`, {counted_keys(keys)}, {CLIENTS} clients, {STORES[kind]}: requests/s, p50, p99",
                    shown[OURS],
                    shown[STOCK],
                    f"{rates[OURS] / rates[STOCK]:.2f}x",
                    NOT_SLOWER,
                    rates[OURS] * NOISE >= rates[STOCK],
                    "",
                    f"{requests}, {requests}",
                )
            )
    return rows


def online_workers(bench: Bench, operation: str, kind: str) -> dict[str, Worker]:
    """A process a side that has materialized 100,000 keys and is ready to be asked for them."""
    history = bench.history(bench.scaled(100_000), bench.scaled(100_000), NARROW, pieces=10)
    places = {side: bench.place() for side in (OURS, STOCK)}
    online = {side: bench.fresh_online(kind, place) for side, place in places.items()}
    return {
        side: bench.worker(
            operation,
            side=side,
            folder=str(places[side]),
            history=history.of(side),
            features=NARROW,
            online=online[side],
            truth=str(history.file),
            keys=history.keys,
        )
        for side in (OURS, STOCK)
    }


def take_blocks(workers: dict[str, Worker], **arguments: int) -> dict[str, list[Answer]]:
    """Run the sides in turn, block by block; the first one warms up and does not count."""
    found: dict[str, list[Answer]] = {OURS: [], STOCK: []}
    for block in range(BLOCKS + 1):
        for side in (OURS, STOCK) if block % 2 else (STOCK, OURS):
            answer = workers[side].run(**arguments)
            if block:
                found[side].append(answer)
    return found


def calls_of(blocks: list[Answer]) -> list[float]:
    """The seconds of each call of some blocks."""
    return [seconds for block in blocks for seconds in block["calls"]]


def tails(calls: list[float]) -> str:
    """The median and the 99th percentile of calls, in milliseconds."""
    return f"{milliseconds(median(calls))}, {milliseconds(quantiles(calls, n=100)[-1])}"


def counted_keys(keys: int) -> str:
    """How many keys a call asks for."""
    return f"{keys} key{'s' if keys > 1 else ''}"


def audit(bench: Bench, name: str) -> list[Row]:
    """The audit of a million keys on Redis."""
    history = bench.history(bench.scaled(MILLION), bench.scaled(MILLION), NARROW, pieces=10)
    place = bench.place()
    online = bench.fresh_online("redis", place)
    common = {"folder": str(place), "history": history.of(OURS), "features": NARROW, "online": online}
    bench.once("materialize", side=OURS, truth=str(history.file), **common)
    found = bench.take_turns(name, lambda _: bench.once("audit", keys=history.keys, **common), (OURS,))
    ours, peak = median_of(found[OURS], "seconds"), median_of(found[OURS], "peak_bytes")
    return [
        Row(
            f"audit of {short(history.keys)} keys, Redis",
            seconds(ours),
            "",
            "",
            "< 60 s, < 1 GiB",
            ours < 60 and peak < GIB,
            memory(found),
            runs(found),
        )
    ]


def small_appends(bench: Bench, name: str) -> list[Row]:
    """Reading 3,000 small appends before compaction and after it."""
    place = bench.place()
    appends, entities = bench.scaled(3_000) // 4, 1_000
    common = {"folder": str(place), "history": str(place / "segments"), "features": NARROW}
    bench.once(
        "make-small-appends",
        folder=str(place),
        segments=str(place / "segments"),
        features=NARROW,
        appends=appends,
        rows=50,
    )
    file = place / "entities.parquet"
    bench.once("make-entities", file=str(file), rows=entities, keys=10_000)

    def read(when: str) -> tuple[list[Answer], list[Answer]]:
        joined = bench.take_turns(
            f"{name}, {when}: retrieval",
            lambda side: bench.once("retrieve", side=side, entities=str(file), **common),
            (OURS,),
        )
        newest = bench.take_turns(f"{name}, {when}: newest", lambda _: bench.once("read-newest", **common), (OURS,))
        return joined[OURS], newest[OURS]

    before = read("before compaction")
    answer = bench.once("compact", **common)
    bench.say(f"{name}: compaction took {answer['seconds']:.1f} s and left {answer['files']} files")
    after = read("after compaction")
    if len({answer["digest"] for answer in before[0] + after[0]}) != 1:
        raise MeasureError(f"{name}: the results before and after compaction differ")
    if len({answer["rows"] for answer in before[1] + after[1]}) != 1:
        raise MeasureError(f"{name}: the newest rows before and after compaction differ")
    rows = []
    for what, old, new in zip(
        (f"retrieval of {entities:,} entity rows", "newest row a key"), before, after, strict=True
    ):
        slow, fast = median_of(old, "seconds"), median_of(new, "seconds")
        rows.append(
            Row(
                f"{what} from {4 * appends:,} small appends: before / after compaction",
                f"{seconds(slow)} / {seconds(fast)}",
                "",
                f"{slow / fast:.1f}x",
                "≤ 3x, or < 2 s",
                slow <= 3 * fast or slow < 2,
                memory({OURS: old}),
                f"{len(old)}",
            )
        )
    return rows


def many_files(bench: Bench, name: str) -> list[Row]:
    """Listing and ledger look-up in a folder of 100,000 files."""
    place = bench.place()
    files = bench.scaled(100_000)
    segments = str(place / "segments")
    answer = bench.once("make-many", folder=str(place), segments=segments, features=NARROW, files=files)
    bench.say(f"{name}: made {files:,} segments: {answer['seconds']:.1f} s")
    rows = []
    for operation, what in (("list-folder", "listing"), ("look-up-ledger", "ledger look-up")):
        run = partial(bench.once, operation, folder=str(place), history=segments, features=NARROW)
        found = bench.take_turns(f"{name}, {what}", lambda _, run=run: run(), (OURS,))  # type: ignore[misc]
        ours = median_of(found[OURS], "seconds")
        rows.append(
            Row(f"{what}, {files:,} files", seconds(ours), "", "", "< 1 s", ours < 1, memory(found), runs(found))
        )
    shutil.rmtree(place)
    return rows


def memory(found: dict[str, list[Answer]]) -> str:
    """The median peak of each side."""
    return ", ".join(f"{median_of(answers, 'peak_bytes') / GIB:.2f} GiB" for answers in found.values())


def runs(found: dict[str, list[Answer]]) -> str:
    """How often each side ran."""
    return ", ".join(str(len(answers)) for answers in found.values())


ROWS: dict[str, Callable[[Bench, str], list[Row]]] = {
    "materialize-redis": partial(materialize, kind="redis", keys=MILLION, features=NARROW, bound=8),
    "materialize-sqlite": partial(materialize, kind="sqlite", keys=MILLION, features=NARROW, bound=5),
    "materialize-wide-redis": partial(materialize, kind="redis", keys=100_000, features=WIDE, bound=8),
    "materialize-wide-sqlite": partial(materialize, kind="sqlite", keys=100_000, features=WIDE, bound=5),
    "retrieve": partial(retrieve, entities=100_000, keys=MILLION, sides=(OURS, STOCK)),
    "retrieve-deep": partial(retrieve, entities=100_000, keys=10_000, sides=(OURS, STOCK)),
    "retrieve-million": partial(retrieve, entities=MILLION, keys=MILLION, sides=(OURS,)),
    "retrieve-spark": partial(retrieve, entities=100_000, keys=MILLION, sides=(OURS, SPARK)),
    "append": append,
    "online-redis": partial(serve_online, kind="redis"),
    "online-sqlite": partial(serve_online, kind="sqlite"),
    "http-redis": partial(serve_http, kind="redis"),
    "http-sqlite": partial(serve_http, kind="sqlite"),
    "audit": audit,
    "small-appends": small_appends,
    "many-files": many_files,
}


def measure(asked: Asked) -> dict[str, str]:
    """The table of the rows asked for."""
    rows: list[Row] = []
    with Valkey(program=redis_program()) as valkey:
        with redis.Redis.from_url(f"redis://{valkey.address}") as client:
            online = redis_version(client.info())
        bench = Bench(asked.folder, valkey, asked.runs, asked.scale)
        for name in asked.only:
            rows += ROWS[name](bench, name)
    return {"stores": f"{table(HEADS, [row.cells() for row in rows])}\n\n{asked.measured(online, PACKAGES)}"}


def main() -> int:
    """See `benchmarks.command`."""
    return command("stores", "Speed and memory of the stores.", measure, rows=list(ROWS), runs=3)


if __name__ == "__main__":
    raise SystemExit(main())
