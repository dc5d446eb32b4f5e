"""Where ledgers start: a new epoch after a topic was made anew, a first position other than the earliest."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping

from headrace.chains import StreamLedger
from headrace.errors import ConfigError, LostRaceError
from streaming.broker import Broker, Log, parse_time_ms
from streaming.settings import StreamConfig

_OFFSETS = re.compile(r"\d+:\d+(,\d+:\d+)*")


def new_epoch(config: StreamConfig, topic: str, at: str = "earliest") -> Mapping[str, object]:
    """Close the ledgers of a topic and open their next epochs, at a position of the topic's present log.

    May be repeated. On a broker without topic ids (the embedded one) each call makes an epoch.

    Args:
        at: as for `begin`.

    Returns:
        The topic's id, where each partition starts, and the new epoch of each view and partition.

    Raises:
        ConfigError: no view has the topic, the broker has it not, or there is no such position.
    """
    views = config.views_of(topic)
    broker = Broker(config)
    partitions = _partitions(broker, config, topic)
    starts = _starts(broker, topic, partitions, at)
    topic_id = broker.topic_id(topic) or f"embedded-{uuid.uuid4().hex}"
    epochs: dict[str, dict[str, int]] = {}
    for view in views:
        for number in range(partitions):
            ledger = StreamLedger(view.contract, topic, number)
            # Where nothing was ever read there is nothing to close: the worker begins at the earliest by itself.
            if at != "earliest" or ledger.end().exists:
                end = ledger.close(topic_id, starts[number])
                epochs.setdefault(view.contract.name, {})[str(number)] = end.epoch
    return {"topic": topic, "topic_id": topic_id, "starts": _json(starts), "epochs": epochs}


def begin(config: StreamConfig, topic: str, at: str) -> Mapping[str, object]:
    """Start ledgers that do not exist yet at a position of the log.

    Args:
        at: `earliest`, `latest`, `group` (what this group committed; the earliest where it committed nothing), a time
            in ISO 8601 (the first event produced at or after it), or an offset for each partition: `0:1200,1:990`.

    Raises:
        ConfigError: no such topic or position, or a ledger exists.
    """
    views = config.views_of(topic)
    broker = Broker(config)
    partitions = _partitions(broker, config, topic)
    starts = _starts(broker, topic, partitions, at)
    topic_id = broker.topic_id(topic)
    ledgers = {
        (view.contract.name, number): StreamLedger(view.contract, topic, number)
        for view in views
        for number in range(partitions)
    }
    for (name, number), ledger in ledgers.items():
        now = ledger.end()
        if now.exists:
            msg = (
                f"the ledger of `{name}` for {topic}[{number}] exists and ends at {now.end}; a start can be chosen "
                "only before the first event was read"
            )
            raise ConfigError(msg)
    for (name, number), ledger in ledgers.items():
        try:
            ledger.begin(starts[number], topic_id)
        except LostRaceError as error:
            msg = f"the ledger of `{name}` for {topic}[{number}] was started meanwhile: {error}; stop the worker first"
            raise ConfigError(msg) from error
    return {"topic": topic, "topic_id": topic_id, "starts": _json(starts)}


def _partitions(broker: Broker, config: StreamConfig, topic: str) -> int:
    present = broker.partitions()
    if topic not in present:
        msg = f"broker {config.bootstrap} has no topic `{topic}`; create it first"
        raise ConfigError(msg)
    return present[topic]


def _starts(broker: Broker, topic: str, partitions: int, at: str) -> Mapping[int, int]:
    logs = {number: broker.log(topic, number) for number in range(partitions)}
    if at == "earliest":
        return {number: log.earliest for number, log in logs.items()}
    if at == "latest":
        return {number: log.latest for number, log in logs.items()}
    if at == "group":
        committed = broker.group_offsets(topic, partitions)
        return {number: committed.get(number, log.earliest) for number, log in logs.items()}
    if _OFFSETS.fullmatch(at):
        return _given(at, logs)
    try:
        time_ms = parse_time_ms(at)
    except ValueError:
        msg = (
            f"--at {at}: expected earliest, latest, group, a time such as 2026-01-31T12:00:00Z, "
            "or an offset for each partition such as 0:1200,1:990"
        )
        raise ConfigError(msg) from None
    return broker.offsets_at(topic, partitions, time_ms)


def _given(at: str, logs: Mapping[int, Log]) -> Mapping[int, int]:
    """Offsets as they were given.

    Raises:
        ConfigError: a partition is not named, or not there, or an offset lies outside its log.
    """
    pairs = [part.split(":") for part in at.split(",")]
    starts = {int(number): int(offset) for number, offset in pairs}
    if sorted(starts) != sorted(logs) or len(pairs) != len(starts):
        msg = f"--at {at}: expected each of the partitions {', '.join(map(str, sorted(logs)))} once"
        raise ConfigError(msg)
    for number, log in logs.items():
        if not log.earliest <= starts[number] <= log.latest:
            msg = f"--at {at}: partition {number} has the offsets {log.earliest} to {log.latest}, not {starts[number]}"
            raise ConfigError(msg)
    return starts


def _json(starts: Mapping[int, int]) -> dict[str, int]:
    return {str(number): starts[number] for number in sorted(starts)}
