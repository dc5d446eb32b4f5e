"""The peer Quix Streams: its Parquet file sink and its Redis sink on one topic, as its documentation has them.

    python benchmarks/quix_app.py <broker> <topic> <events> <folder> <redis port> <redis database>

Run by `benchmarks.stream_peers`, in the environment of the peers. It prints one JSON line: the seconds from the
first event that was processed to the end of the last write to either sink, so that neither start nor end of the
consumer count.
"""

from __future__ import annotations

import json
import sys
import time
import uuid

import orjson
from quixstreams import Application
from quixstreams.sinks.community.file.formats import ParquetFormat
from quixstreams.sinks.community.file.local import LocalFileSink
from quixstreams.sinks.community.redis import RedisSink

COMMIT_S = 5.0
"""How often the sinks are written to; the default."""


class Clock:
    """When the first event was processed, when a sink was written to last, and how many events there were."""

    first_s = 0.0
    last_s = 0.0
    events = 0


clock = Clock()


class TimedFileSink(LocalFileSink):  # type: ignore[misc]
    """The sink, noting when it is done."""

    def flush(self) -> None:
        """Write, and note the time."""
        super().flush()
        clock.last_s = time.perf_counter()


class TimedRedisSink(RedisSink):  # type: ignore[misc]
    """The sink, noting when it is done."""

    def flush(self) -> None:
        """Write, and note the time."""
        super().flush()
        clock.last_s = time.perf_counter()


def main() -> None:
    """Drain the topic."""
    broker, topic, wanted, folder, port, database = sys.argv[1:]
    events = int(wanted)

    def processed(topic: str, partition: int, offset: int) -> None:
        """Called after each event. `run(count=...)` would count each of them once a sink."""
        clock.events += 1
        if clock.events == 1:
            clock.first_s = time.perf_counter()
        if clock.events == events:
            app.stop()  # writes what is left

    app = Application(
        broker_address=broker,
        consumer_group=f"quix-{uuid.uuid4().hex}",  # of this run alone: it reads from the beginning
        auto_offset_reset="earliest",
        commit_interval=COMMIT_S,
        on_message_processed=processed,
        use_changelog_topics=False,
        auto_create_topics=False,
        loglevel="WARNING",
    )
    frame = app.dataframe(app.topic(topic, value_deserializer="json", key_deserializer="bytes"))
    frame.sink(TimedFileSink(directory=folder, format=ParquetFormat()))
    # orjson: the default of this sink is the slower `json`.
    frame.sink(TimedRedisSink(host="127.0.0.1", port=int(port), db=int(database), value_serializer=orjson.dumps))
    app.run()
    print(json.dumps({"seconds": clock.last_s - clock.first_s}), flush=True)


if __name__ == "__main__":
    main()
