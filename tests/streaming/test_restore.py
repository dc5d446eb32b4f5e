"""Rebuilding: damaged segments, a lost offline or online store, another cluster. Real servers, and an oracle."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from headrace.chains import Folder
from headrace.compact import FILES_A_MERGE, compact
from headrace.damage import SET_ASIDE
from headrace.segments import SegmentName
from tests.servers import Valkey
from tests.streaming.conftest import Stream, StreamFactory
from tests.streaming.oracle import contract_of, judge, read_offline, read_topic, verify
from tests.streaming.process import Worker, emit, run
from tests.streaming.test_faults import make_anew


def filled(stream: Stream, log: Path) -> Folder:
    """A folder with several segments of each partition."""
    with Worker(stream.environment, log) as worker:
        worker.start().wait_ready()
        for seed in range(5):
            emit(stream.environment, count=1000, seed=seed, bad_fraction=0.05, late_fraction=0.1)
            worker.wait_drained(stream.ends())
        worker.stop()
    return Folder.of(contract_of(stream.repo))


def files(folder: Folder, partition: int) -> list[Path]:
    """The valid files of a partition, in the order of their positions."""
    (chain,) = (chain for name, chain in folder.chains().items() if name.endswith(f"-{partition}-0"))
    return [Path(str(folder.path_of(segment))) for segment in chain.valid]


def flip(path: Path) -> None:
    """Change one bit in the middle of a file's first column: its footer stays whole."""
    column = pq.read_metadata(path).row_group(0).column(0)
    place = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def delete_records(stream: Stream, below: dict[int, int]) -> None:
    """Let the topic lose what lies below an offset of each partition."""
    places = [TopicPartition(stream.topic, number, offset) for number, offset in below.items()]
    admin = AdminClient({"bootstrap.servers": stream.broker})
    for future in admin.delete_records(places).values():
        future.result(10)


def truth_of(stream: Stream) -> dict[Any, Any]:
    """The rows of what the topic has."""
    return judge(read_topic(stream.broker, stream.topic)).accepted


def restored(stream: Stream, *options: str, code: int = 0, **settings: str) -> dict[str, Any]:
    done = run({**stream.environment, **settings}, "restore", "--topic", stream.topic, *options)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_damaged_segments_are_set_aside_and_read_again(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit, a file cut short, one that is gone, an end that is garbage, a merged file; and kills meanwhile."""
    folder = filled(stream, tmp_path / "log")
    assert restored(stream)["views"] == {}, "nothing is damaged"
    monkeypatch.setitem(FILES_A_MERGE, 1, 2)
    compact(contract_of(stream.repo), grace_s=0)
    levels = {name.level for name in folder.names() if isinstance(name, SegmentName)}
    assert levels >= {0, 1}, "the newest of a level is never merged, the others are"

    gone = files(folder, 3)[0]
    damaged = {
        "a bit of a merged file": files(folder, 0)[0],
        "a file cut short": files(folder, 1)[-2],
        "an end": files(folder, 2)[-1],
    }
    flip(damaged["a bit of a merged file"])
    damaged["a file cut short"].write_bytes(damaged["a file cut short"].read_bytes()[:-9])
    damaged["an end"].write_bytes(b"garbage")
    gone.unlink()

    told = restored(stream, "--dry-run", code=1)["views"]["driver_stats"]
    assert {name for chain in told.values() for name in chain["damaged"]} == {path.name for path in damaged.values()}
    assert {chain[-3] for chain, one in told.items() if one["missing"]} == {"0", "1", "3"}
    assert all(path.exists() for path in damaged.values()), "a dry run changes nothing"

    for step in ("set-aside.1.renamed", "restore.1.temporary-written", "restore.3.linked", "restore.4.folder-fsynced"):
        killed = (
            "import os, signal\n"
            "from headrace import faults\n"
            "from streaming.restore import restore\n"
            "from streaming.settings import read_config\n"
            f"faults.hook = lambda step: step == {step!r} and os.kill(os.getpid(), signal.SIGKILL)\n"
            f"restore(read_config(), {stream.topic!r})\n"
        )
        done = subprocess.run([sys.executable, "-c", killed], env=stream.environment, check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
    restored(stream)
    assert restored(stream, "--dry-run")["ok"]
    aside = {path.name for path in (folder.path / SET_ASIDE).iterdir()}
    assert aside == {path.name for path in damaged.values()}
    with Worker(stream.environment, tmp_path / "log") as worker:  # the end is read again by the worker itself
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    verify(stream.broker, stream.topic, stream.repo)


def test_ends_gaps_and_a_whole_folder(stream: Stream, tmp_path: Path) -> None:
    folder = filled(stream, tmp_path / "log")

    # Workers that know where a ledger ended would go on behind it.
    end = files(folder, 2)[-1]
    content = end.read_bytes()
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        end.write_bytes(b"garbage")
        refused = run(stream.environment, "restore", "--topic", stream.topic)
        assert refused.returncode == 1
        assert "is damaged, and 1 workers of group" in refused.stderr
        worker.stop()
    end.write_bytes(content)

    # What the topic lost too is a gap, once that is allowed.
    first, second = files(folder, 0)[:2]
    lost = int(second.name[-28:-8]) - 3
    first.unlink()
    delete_records(stream, {0: lost})
    refused = run(stream.environment, "restore", "--topic", stream.topic)
    assert refused.returncode == 1
    assert f"begins at {lost} now; restore the files from a backup, or set HEADRACE_ALLOW_GAPS=true" in refused.stderr
    (told,) = restored(stream, HEADRACE_ALLOW_GAPS="true")["views"]["driver_stats"].values()
    assert (told["lost"], told["restored"]) == ([[0, lost]], [[lost, lost + 3]])
    assert read_offline(contract_of(stream.repo), stream.topic).rows == truth_of(stream)

    # Of the whole folder what the topic still has is read again, and told is what it has not.
    shutil.rmtree(folder.path)
    starts = {0: lost, 1: 40, 2: 0, 3: 1}
    delete_records(stream, starts)
    started = run(stream.environment, "start", "--topic", stream.topic, "--at", "earliest")
    assert json.loads(started.stdout)["starts"] == {str(number): offset for number, offset in starts.items()}
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    assert read_offline(contract_of(stream.repo), stream.topic).rows == truth_of(stream)


def test_a_move_to_another_cluster_with_an_exact_start(stream: Stream, tmp_path: Path) -> None:
    """What is drained is mirrored there too, under other offsets: nothing is lost, nothing is taken twice."""
    emit(stream.environment, count=2000, seed=1)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
        make_anew(stream)
        emit(stream.environment, count=700, seed=1)  # the mirror's copies of what is drained
        exact = stream.ends()
        emit(stream.environment, count=900, seed=2)
        at = ",".join(f"{number}:{offset}" for number, offset in exact.items())
        for wrong, why in (("0:1", "each of the partitions 0, 1, 2, 3 once"), (at.replace(":", ":9", 1), "not 9")):
            refused = run(stream.environment, "start", "--topic", stream.topic, "--new-epoch", "--at", wrong)
            assert refused.returncode == 1
            assert why in refused.stderr
        for _ in range(2):  # may be repeated
            started = run(stream.environment, "start", "--topic", stream.topic, "--new-epoch", "--at", at)
            assert json.loads(started.stdout)["starts"] == {str(number): offset for number, offset in exact.items()}
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    expected = {origin: row for origin, row in truth_of(stream).items() if origin[1] >= exact[origin[0]]}
    assert len(expected) == 900
    assert read_offline(contract_of(stream.repo), stream.topic, epoch=1).rows == expected
    assert len(read_offline(contract_of(stream.repo), stream.topic, epoch=0).rows) == 2000


def test_a_lost_online_store_is_filled_again_while_the_stream_goes_on(
    make_stream: StreamFactory, valkey_server: Valkey, tmp_path: Path
) -> None:
    """What the worker brings again by itself is turned off here: that is for what was lost within minutes."""
    stream = make_stream(apply_again_seconds=0)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        emit(stream.environment, count=3000, seed=1)
        worker.wait_drained(stream.ends())
        valkey_server.stop()
        valkey_server.start()
        command = [sys.executable, "-m", "luigi", "--module", "batch", "Repair", "--local-scheduler"]
        repairing = subprocess.Popen(command, env=stream.environment, stderr=subprocess.DEVNULL)
        emit(stream.environment, count=2000, seed=2, late_fraction=0.3)
        assert repairing.wait(120) == 0
        worker.wait_drained(stream.ends())
        worker.stop()
    verify(stream.broker, stream.topic, stream.repo)
