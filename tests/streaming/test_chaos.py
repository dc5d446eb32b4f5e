"""Everything goes wrong at once, and nothing is lost, doubled or older than before. `make chaos` is the long one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.servers import Kafka, Valkey
from tests.streaming.chaos import Campaign, Load, Reader, copy_for_reader, say, schedule, table
from tests.streaming.conftest import Network, StreamFactory
from tests.streaming.oracle import verify

ROUNDS = int(os.environ.get("HEADRACE_TEST_CHAOS_ROUNDS", "1"))
RATE = float(os.environ.get("HEADRACE_TEST_CHAOS_RATE", "300"))
SEED = int(os.environ.get("HEADRACE_TEST_SEED", "7"))


@pytest.mark.timeout(300 + 120 * ROUNDS)
def test_chaos(
    make_stream: StreamFactory, network: Network, kafka_server: Kafka, valkey_server: Valkey, tmp_path: Path
) -> None:
    stream = make_stream(network=network, store_retry_seconds=120)
    faults = schedule(SEED, ROUNDS)
    reader = Reader(copy_for_reader(stream.repo, valkey_server, network))
    load = Load(stream, seed=SEED, rate=RATE)
    try:
        with Campaign(stream, network, kafka_server, valkey_server, tmp_path) as campaign:
            load.start()
            reader.start()
            try:
                campaign.run(faults)
            finally:
                load.finish()
            campaign.settle()
            reader.finish()
        counts = verify(stream.broker, stream.topic, stream.repo, seen=reader.seen)
        assert counts["messages"] > load.sent["taken"] > load.sent["not taken"]
        assert sum(map(len, reader.seen.values())) > counts["keys"]
    except BaseException:
        say(f"HEADRACE_TEST_SEED={SEED} HEADRACE_TEST_CHAOS_ROUNDS={ROUNDS} repeats this schedule:")
        say("\n".join(map(str, faults)))
        say(table({**load.sent, "polls": reader.polls}))
        raise
    say(
        "\n"
        + table(
            {
                **campaign.done,
                **{f"workers that ended by themselves {when}": count for when, count in campaign.ended.items()},
                "events that the broker did not take": load.sent["not taken"],
                "transactions committed": load.sent["transactions"],
                "transactions aborted": load.sent["aborted"],
                "events": counts["messages"],
                "accepted": counts["accepted"],
                "bad": counts["bad"],
                "tombstones": counts["skipped"],
                "lost": 0,
                "doubled": 0,
                "letters": counts["letters"],
                "letters repeated": counts["letters"] - counts["bad"],
                "keys online": counts["keys"],
                "changes seen online": sum(map(len, reader.seen.values())),
                "polls": reader.polls,
                "went back": 0,
                "segments": counts["segments"],
                "seed": SEED,
            }
        )
    )
