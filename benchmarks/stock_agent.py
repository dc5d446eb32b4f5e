"""The peer: a stock Faust agent that hands batches of 1,000 events to `FeatureStore.push`, as users write it.

Run by `benchmarks.stream`. It prints one JSON line when it has seen all events: how many, and the seconds
from the first batch's arrival to the last batch's end, so neither start-up nor waiting for the group counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from typing import Any

import faust
import pandas as pd
from faust.types import StreamT
from feast import FeatureStore
from feast.data_source import PushMode

BATCH = 1_000
EVENTS = int(os.environ["STOCK_EVENTS"])

store = FeatureStore(repo_path=os.environ["STOCK_REPO"])
app = faust.App(
    f"stock-{uuid.uuid4().hex}",  # a group of this run alone: it reads from the beginning
    broker=f"kafka://{os.environ['STOCK_BROKER']}",
    topic_disable_leader=True,
    web_enabled=False,
    broker_max_poll_interval=1e8,
    consumer_auto_offset_reset="earliest",
)
topic = app.topic(os.environ["STOCK_TOPIC"], value_serializer="json", key_serializer="raw")


@app.agent(topic)
async def push(stream: StreamT[Any]) -> None:
    """Push each batch to both stores."""
    seen = 0
    start: float | None = None
    async for batch in stream.take(BATCH, within=1.0):
        start = start or time.perf_counter()
        frame = pd.DataFrame(batch)
        for column in ("datetime", "created"):
            frame[column] = pd.to_datetime(frame[column], utc=True).astype("datetime64[us, UTC]")
        frame = frame.astype({"conv_rate": "float32", "acc_rate": "float32", "avg_daily_trips": "int32"})
        store.push("driver_stats_push", frame, to=PushMode.ONLINE_AND_OFFLINE)
        seen += len(batch)
        if seen >= EVENTS:
            print(json.dumps({"events": seen, "seconds": time.perf_counter() - start}), flush=True)
            await asyncio.sleep(3600)
