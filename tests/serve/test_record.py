"""`pi0 serve --record`: what lies in the dataset, what begins an episode, what a full disk does."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_folder import write_folder
from serving import (
    IMAGE,
    SOON,
    Running,
    StateEngine,
    ask,
    eventually,
    make_policy,
    observation,
    read,
    running,
)
from test_site import CHROMIUM, dump_dom, get, metric

from pi0.data import Dataset
from pi0.errors import Pi0Error
from pi0.serve import record
from pi0.serve.options import ServeOptions
from pi0.serve.wire import pack

ODD = np.add.outer(np.arange(23) * 5, np.arange(31) * 3)[..., None] + np.array([0, 20, 40])


yield_to_others = record._yield_to_others


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine threads of the lowest priority could take minutes."""
    monkeypatch.setattr(record, "_yield_to_others", lambda: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "recorded"


def recording(folder: Path, engine: StateEngine | None = None, **robot: str) -> Any:
    return running(make_policy(engine or StateEngine(), **robot), ServeOptions(record=folder))


def episodes(folder: Path) -> list[list[float]]:
    """The first value of each frame's action, by episode; the folder is sound."""
    dataset = Dataset.open(folder)
    assert dataset.check() == []
    first = dataset.column("action")[:, 0].round(3).tolist()
    return [first[a:b] for a, b in pairwise(dataset.episode_starts)]


def test_what_is_recorded(folder: Path) -> None:
    """Observations and whole chunks, one episode of this connection; images of any form."""
    floats = ODD.transpose(2, 0, 1).astype(np.float32) / 255
    with recording(folder) as served, served.connect() as client:
        for value in (0.5, 0.25):
            ask(client, observation(value, images={"base": floats, "wrist": IMAGE}))
        ask(client, {"nonsense": 1})  # an error is no frame
    dataset = Dataset.open(folder)
    assert episodes(folder) == [[0.5, 0.25]]
    assert dataset.robot == "generic"
    assert list(dataset.tasks) == ["go", "go"]
    assert dataset.cameras == ("observation.images.base", "observation.images.wrist")
    np.testing.assert_array_equal(dataset.column("observation.state")[:, 0], [0.5, 0.25])
    chunks = dataset.column("served.chunk").reshape(2, 50, 14)
    np.testing.assert_allclose(chunks[1], 0.25, rtol=1e-5)
    seconds = dataset.column("served.seconds")[:, 0]
    assert seconds[0] == 0 < seconds[1] < SOON
    picture = dataset.frames("observation.images.base")[np.array([0])][0]
    assert picture.shape == (22, 30, 3)
    assert np.abs(picture.astype(int) - ODD[:22, :30]).mean() < 10  # as AV1 keeps it


def test_pictures_smaller_than_a_videos_are_padded(folder: Path) -> None:
    thin = np.full((9, 1, 3), 200, np.uint8)
    with recording(folder) as served, served.connect() as client:
        ask(client, observation(1, images={"base": thin, "wrist": IMAGE}))
    assert episodes(folder) == [[1]]
    picture = Dataset.open(folder).frames("observation.images.base")[np.array([0])][0]
    assert picture.shape == (8, 4, 3)
    assert np.abs(picture.astype(int) - 200).max() < 10


def test_what_begins_an_episode(folder: Path) -> None:
    """A connection, `pi0/reset`, another sentence; clients beside each other do not mix."""
    with recording(folder) as served, served.connect() as one, served.connect() as two:
        ask(one, observation(1))
        ask(two, observation(11))
        ask(one, observation(2, **{"pi0/reset": False}))
        ask(two, observation(12))
        ask(one, observation(3, **{"pi0/reset": True}))
        ask(one, observation(4, prompt="stop"))
        with served.connect() as three:
            ask(three, observation(21))
    found = sorted(episodes(folder))
    assert found == [[1, 2], [3], [4], [11, 12], [21]]


def test_a_client_that_leaves_before_its_answer_leaves_no_episode(folder: Path) -> None:
    """It is gone when its chunk is finished: nobody got it, and nobody would end its episode."""
    policy, finished, left = make_policy(StateEngine()), threading.Event(), threading.Event()
    decode = policy.decode

    def decode_late(*given: Any) -> Any:
        finished.set()
        assert left.wait(SOON)
        return decode(*given)

    with running(policy, ServeOptions(record=folder)) as served:
        policy.decode = decode_late  # type: ignore[method-assign]
        with served.connect() as client:
            client.send(pack(observation(1)))
            assert finished.wait(SOON)
        eventually(lambda: not served.server.sessions)
        left.set()
        with served.connect() as other:
            ask(other, observation(2))
        eventually(lambda: served.server.metrics.recording["episodes"] == 1)
        assert not served.server.recorder._open
    assert episodes(folder) == [[2]]


def test_a_later_server_goes_on_with_the_dataset(folder: Path) -> None:
    for value in (1, 2):
        with recording(folder) as served, served.connect() as client:
            ask(client, observation(value))
    assert episodes(folder) == [[1], [2]]


def test_another_robots_episodes_are_not_gone_on_with(folder: Path) -> None:
    pipeline = make_policy(StateEngine()).pipeline
    record.require_own(folder, pipeline)
    with recording(folder) as served, served.connect() as client:
        ask(client, observation(1))
    record.require_own(folder, pipeline)
    found = r"for robot libero at 10 Hz.*found others, of robot generic at 10 Hz"
    with pytest.raises(Pi0Error, match=found):
        record.require_own(folder, make_policy(StateEngine(), "libero").pipeline)


def test_other_datasets_are_not_gone_on_with(folder: Path) -> None:
    pipeline = make_policy(StateEngine()).pipeline
    write_folder(folder)
    with pytest.raises(Pi0Error, match=r"episodes of a server for robot generic .* found others"):
        record.require_own(folder, pipeline)
    shard = folder / "data" / "chunk-000" / "file-000.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(Pi0Error, match=r"file-000\.parquet: expected a parquet file, found"):
        record.require_own(folder, pipeline)
    for path in shard.parent.iterdir():
        path.unlink()
    with pytest.raises(Pi0Error, match=r"written by pi0, found meta/info\.json without its episo"):
        record.require_own(folder, pipeline)
    pq.write_table(pa.table({"action": [0.0]}), shard.with_name("episode_000000.parquet"))
    with pytest.raises(Pi0Error, match=r"episode_000000\.parquet: expected a shard written by pi0"):
        record.require_own(folder, pipeline)


def test_other_pictures_do_not_fit_and_leave_the_dataset_sound(folder: Path) -> None:
    with recording(folder) as served:
        for images in ({"base": IMAGE}, {"base": IMAGE[:20]}, {"base": IMAGE}):
            with served.connect() as client:
                ask(client, observation(1, images=images))
            # They are written one by one, and the order of the ends is that of the connections.
            eventually(lambda: not served.server.sessions)
        eventually(lambda: sum(served.server.metrics.recording[w] for w in COUNTED) == 3)
        assert served.server.metrics.recording["errors"] == 1
        assert (
            "expected episodes of the same cameras and sizes, observation.images.base 24×32 and 14 "
            "state values, found observation.images.base 20×32 and 14 state values"
        ) in served.server.recorder.error
    assert episodes(folder) == [[1], [1]]
    with recording(folder) as served:
        with served.connect() as client:
            ask(client, observation(2, images={"wrist": IMAGE}))
        eventually(lambda: served.server.recorder.error is not None)
        assert "of the same cameras, columns and frames per second" in served.server.recorder.error
    assert episodes(folder) == [[1], [1]]


COUNTED = ("episodes", "errors")


def test_a_server_that_ends_does_not_yield(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes under way are encoded by another thread, which the waiting one starts."""
    encoders: list[str] = []
    write = record._Writer.write

    def watched(writer: Any, episode: Any) -> None:
        encoders.append(threading.current_thread().name + str(threading.get_native_id()))
        write(writer, episode)

    monkeypatch.setattr(record._Writer, "write", watched)
    yielding: list[str] = []
    monkeypatch.setattr(
        record,
        "_yield_to_others",
        lambda: yielding.append(threading.current_thread().name + str(threading.get_native_id())),
    )
    with recording(folder) as served, served.connect() as client:
        ask(client, observation(0.5))
        ask(client, observation(0.25, **{"pi0/reset": True}))
        eventually(lambda: len(encoders) == 1)
        served.stop()
    assert encoders[0] in yielding
    assert len(encoders) == 2
    assert encoders[1] not in yielding
    assert episodes(folder) == [[0.5], [0.25]]


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no priority of its own")
def test_a_recording_thread_yields_to_others() -> None:
    found = []

    def run() -> None:
        yield_to_others()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [record.NICE]
    assert os.getpriority(os.PRIO_PROCESS, 0) < record.NICE


def test_long_episodes_are_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_FRAMES", 2)
    with recording(folder) as served, served.connect() as client:
        for value in range(5):
            ask(client, observation(value))
    assert episodes(folder) == [[0, 1], [2, 3], [4]]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Episodes under way cannot be written while its value is true."""
    full = [True]
    add = record._Episode.add

    def fail(*given: Any) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(*given)

    monkeypatch.setattr(record._Episode, "add", fail)
    return full


def test_a_full_disk_does_not_stop_serving(
    folder: Path, full_disk: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    """The error is in the log, the metrics and the page's status; recording goes on later."""
    with recording(folder) as served, served.connect() as client:
        assert metric(served, 'pi0_recorded_total{what="dropped"}') == 0
        for value in (1, 2):
            np.testing.assert_allclose(ask(client, observation(value))["actions"], value, rtol=1e-5)
        eventually(lambda: metric(served, 'pi0_recorded_total{what="dropped"}') == 1)
        assert metric(served, 'pi0_recorded_total{what="errors"}') == 1
        status = get(served, "/status.json")[1].decode()
        assert "expected room for an episode in recorded, found: No space left" in status
        assert str(folder.parent) not in status
        full_disk[0] = False
        ask(client, observation(3, **{"pi0/reset": True}))
    assert caplog.text.count("expected room for an episode") == 1
    assert episodes(folder) == [[3]]


def test_a_shard_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next episode takes its place."""
    true = record.write_shard

    def fail(*_: Any) -> None:
        monkeypatch.setattr(record, "write_shard", true)
        raise Pi0Error("expected room for the file, found: No space left on device.")

    monkeypatch.setattr(record, "write_shard", fail)
    with recording(folder) as served:
        for value in (1, 2):
            with served.connect() as client:
                ask(client, observation(value))
            eventually(lambda: not served.server.sessions)
    assert episodes(folder) == [[2]]
    assert served.server.metrics.recording["errors"] == 1


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_its_own_is_logged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(record, "read_prompt", lambda *_: 1 / 0)
    with recording(folder) as served, served.connect() as client:
        assert "actions" in ask(client, observation(1))
        eventually(lambda: served.server.recorder.error is not None)
    assert "ZeroDivisionError" in caplog.text


def test_a_slow_disk_delays_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames beyond the queue are dropped and counted, and answers come all the while."""
    writing, slow, frame = threading.Event(), threading.Event(), pack(observation(1))
    add = record._Episode.add

    def add_late(*given: Any) -> None:
        writing.set()
        assert slow.wait(SOON)
        add(*given)

    monkeypatch.setattr(record, "QUEUE_BYTES", 3 * len(frame))
    monkeypatch.setattr(record._Episode, "add", add_late)
    with recording(folder) as served, served.connect() as client:
        client.send(frame)
        read(client)
        assert writing.wait(SOON)  # of the first one
        for _ in range(6):
            client.send(frame)
            assert "actions" in read(client)
        eventually(lambda: served.server.metrics.recording["dropped"] == 3)
        slow.set()
    assert episodes(folder) == [[1] * 4]


def test_episodes_that_end_together_wait_for_their_encoding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of all robots do when the server ends."""
    ended, write = threading.Event(), record.write_shard

    def write_late(*given: Any) -> None:
        assert ended.wait(SOON)
        write(*given)

    monkeypatch.setattr(record, "write_shard", write_late)
    monkeypatch.setattr(record, "MAX_UNWRITTEN", 1)
    with recording(folder) as served, contextlib.ExitStack() as stack:
        recorder, counts = served.server.recorder, served.server.metrics.recording
        for value in range(5):
            ask(stack.enter_context(served.connect()), observation(value))
        eventually(lambda: counts["frames"] == 5)
        stack.close()
        eventually(lambda: not recorder._open)
        ended.set()
    assert (counts["episodes"], counts["errors"]) == (5, 0)


def test_a_killed_server_leaves_a_sound_dataset(folder: Path) -> None:
    """Episodes under way have no name; those that are over are complete."""
    with recording(folder) as served, served.connect() as client:
        with served.connect() as other:
            ask(other, observation(1))
        ask(client, observation(2))
        eventually(lambda: served.server.metrics.recording["episodes"] == 1)
        eventually(lambda: (folder / "meta" / "info.json").exists())
        assert not [path for path in folder.rglob(".*") if path.stat().st_size]
        assert episodes(folder) == [[1]]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_shows_the_error(folder: Path, tmp_path: Path, full_disk: list[bool]) -> None:
    with recording(folder) as served, served.connect() as client:
        ask(client, observation(1))
        eventually(lambda: served.server.recorder.error is not None)
        dom = dump_dom(f"http://{served.address}/", tmp_path / "profile")
    numbers = dict(re.findall(r'<dd data-number="([^"]+)">([^<]*)</dd>', dom))
    assert (numbers["recording errors"], numbers["frames"]) == ("1", "0")
    assert re.search(r'<p id="recording" class="bad">recording: expected room for an ep', dom)


def test_the_page_says_nothing_of_recording_without(tmp_path: Path) -> None:
    with running(make_policy(StateEngine())) as served:
        assert '"recording": null' in get(served, "/status.json")[1].decode()
        assert isinstance(served, Running)


def test_the_last_episode_does_not_wait_for_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta files have it soon, though they are not written for each episode."""
    monkeypatch.setattr(record, "FINISH_SHARE", 0.02)
    with recording(folder) as served, served.connect() as client:
        for value in (1, 2):
            ask(client, observation(value, **{"pi0/reset": True}))
        ask(client, observation(3, **{"pi0/reset": True}))
        eventually(lambda: served.server.metrics.recording["episodes"] == 2)
        eventually(lambda: Dataset.open(folder).check() == [])
        assert episodes(folder) == [[1], [2]]


def test_a_later_server_completes_what_a_killed_one_left(folder: Path) -> None:
    with recording(folder) as served, served.connect() as client:
        ask(client, observation(1))
    before = (folder / "meta" / "info.json").read_text()
    with recording(folder) as served, served.connect() as client:
        ask(client, observation(2))
    (folder / "meta" / "info.json").write_text(before)  # as if killed before it was written
    assert {finding.code for finding in Dataset.open(folder).check()} >= {"totals"}
    with recording(folder):
        pass
    assert episodes(folder) == [[1], [2]]
