"""Recording what is served: observations and actions as episodes of a LeRobotDataset v3 folder.

Nothing of it delays an answer or ends the server. The computing thread leaves a frame in a bounded
queue; one thread lays frames down in a file for each episode that is under way, which has no name
and so vanishes with the process; another encodes episodes that are over. Both yield to everything
else on the machine, until the server ends and waits for them. What fails, such as a full disk, is
logged and counted, and shown on the page.

    observation.images.NAME   pictures as they came, without an odd last row or column
    observation.state         [D]
    action                    [D], the first of the chunk, which is for this observation's tick
    served.chunk              [H · D], the whole chunk
    served.seconds            since the episode's first observation arrived
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.data import Recording, Schema, finish, next_place, write_shard, written_schema
from pi0.data.schema import ACTION, LEAST_SIDE, SERVED_SECONDS, STATE
from pi0.errors import Pi0Error
from pi0.policy import Pipeline
from pi0.policy.observation import read_prompt
from pi0.serve.answer import Frame
from pi0.serve.pictures import read_pictures

logger = logging.getLogger("pi0.serve")
CHUNK = "served.chunk"
PICTURES = "observation.images."
DEFAULT_FPS = 10  # where the robot's table does not say
QUEUE_BYTES = 256 << 20
MAX_FRAMES = 10_000  # of an episode; the next frame begins another
MAX_UNWRITTEN = 32  # episodes that wait to be encoded, besides one of each client
RETRY_S = 10.0  # after an error, before a client's frames are recorded again
FINISH_SHARE = 0.1  # of the time that the meta files may take, which grows with the dataset
NICE = 19

Count = Callable[[str, int], None]


class Recorder:
    """Records frames of any number of clients, each client's in episodes of its own."""

    def __init__(self, folder: Path, pipeline: Pipeline, count: Count) -> None:
        """
        Args:
            folder: of the dataset, which may be there already.
            count: called with "episodes", "frames", "dropped" (frames) or "errors", and how many.
        """
        self.error: str | None = None  # the last one
        self._folder, self._pipeline, self._count = folder, pipeline, count
        self._features = _picture_features([camera.key for camera in pipeline.robot.cameras])
        self._queue: deque[Frame | str | None] = deque()
        self._queued_bytes = 0
        self._condition = threading.Condition()
        self._open: dict[str, _Episode] = {}
        self._lost: dict[str, float] = {}  # client → when its frames are recorded again
        self._writer = _Writer(folder)
        self._encoder = ThreadPoolExecutor(1, "pi0-encode", initializer=_yield_to_others)
        self._encoder.submit(self._finish)  # what a killed server left
        self._unwritten = self._most = 0  # `_most`: episodes that were under way at once
        self._thread = threading.Thread(target=self._run, name="pi0-record", daemon=True)
        self._thread.start()

    def put(self, frame: Frame) -> None:
        """Takes a frame, or counts it as dropped if the disk is too slow; never waits for it."""
        with self._condition:
            fits = self._queued_bytes + frame.size <= QUEUE_BYTES
            if fits:
                self._queued_bytes += frame.size
                self._queue.append(frame)
                self._condition.notify()
        if not fits:
            self._count("dropped", 1)

    def end(self, client: str) -> None:
        """The client's episode is over."""
        with self._condition:
            self._queue.append(client)
            self._condition.notify()

    def hurry(self) -> None:
        """Encodes episodes that end from now on with the priority of the caller, whose child the
        new thread is: the old one cannot raise its own."""
        with self._condition:
            before, self._encoder = self._encoder, ThreadPoolExecutor(1, "pi0-encode")
            self._encoder.submit(before.shutdown)

    def close(self) -> None:
        """Writes what is under way; takes as long as that takes."""
        with self._condition:
            self._queue.append(None)
            self._condition.notify()
        self._thread.join()
        self._encoder.submit(self._finish)
        self._encoder.shutdown()

    def _run(self) -> None:
        _yield_to_others()
        while (event := self._take()) is not None:
            if isinstance(event, str):
                self._lost.pop(event, None)
                self._close_episode(event)
                continue
            with self._reporting(event.client):
                self._add(event)
        for client in list(self._open):
            self._close_episode(client)

    def _take(self) -> Frame | str | None:
        with self._condition:
            while not self._queue:
                self._condition.wait()
            event = self._queue.popleft()
            if isinstance(event, Frame):
                self._queued_bytes -= event.size
            return event

    def _add(self, frame: Frame) -> None:
        client = frame.client
        if frame.reset:
            self._lost.pop(client, None)
            self._close_episode(client)
        if time.monotonic() < self._lost.get(client, 0):
            self._count("dropped", 1)
            return
        row, task = self._row(frame), read_prompt(frame.observation, self._pipeline.default_prompt)
        episode = self._open.get(client)
        if episode is not None and not episode.continues(row, task):
            self._close_episode(client)
            episode = None
        if episode is None:
            sizes = {k: (v.shape[0], v.shape[1]) for k, v in row.items() if k.startswith(PICTURES)}
            schema = _schema(self._pipeline, sizes, len(frame.state))
            episode = self._open[client] = _Episode(self._folder, schema, task, row, frame.arrived)
            self._most = max(self._most, len(self._open))
        episode.add(row, frame.arrived)
        self._count("frames", 1)

    def _row(self, frame: Frame) -> dict[str, NDArray[Any]]:
        pictures = {
            self._features[key]: _for_video(picture)
            for key, picture in read_pictures(frame.observation, self._pipeline)
        }
        return {
            **pictures,
            STATE: frame.state,
            ACTION: frame.actions[0],
            CHUNK: frame.actions.ravel(),
        }

    def _close_episode(self, client: str) -> None:
        """Has the client's episode encoded, if there is one."""
        episode = self._open.pop(client, None)
        if episode is None:
            return
        with self._reporting(client):
            if self._unwritten >= (most := MAX_UNWRITTEN + self._most):
                episode.close()
                raise Pi0Error(
                    f"recording: expected at most {most} episodes to wait for their encoding, "
                    "found more. This machine is too slow to record all of them."
                )
            with self._condition:
                self._unwritten += 1
                encoded = self._encoder.submit(self._encode, episode)
            encoded.add_done_callback(self._written)

    def _written(self, _: Future[None]) -> None:
        with self._condition:
            self._unwritten -= 1

    def _encode(self, episode: _Episode) -> None:
        with contextlib.closing(episode), self._reporting(None):
            self._writer.write(episode)
            self._count("episodes", 1)
        if (seconds := self._writer.seconds_to_finish()) is not None:
            timer = threading.Timer(seconds, self._finish_later)
            timer.daemon = True
            timer.start()

    def _finish_later(self) -> None:
        with self._condition, contextlib.suppress(RuntimeError):  # closed, and so finished
            self._encoder.submit(self._finish)

    def _finish(self) -> None:
        with self._reporting(None):
            self._writer.finish()

    @contextlib.contextmanager
    def _reporting(self, client: str | None) -> Iterator[None]:
        """Says and counts what goes wrong; the client's episode is lost with it."""
        try:
            yield
            return
        except Pi0Error as error:
            self.error = str(error)
            logger.error("%s", self.error)
        except OSError as error:
            self.error = (
                f"recording: expected room for an episode in {self._folder}, found: "
                f"{error.strerror or error}. Make room; robots are served meanwhile."
            )
            logger.error("%s", self.error)
        except Exception as error:  # of any kind: serving goes on, and recording as well
            self.error = "recording: expected to write an episode, found an internal error."
            logger.error("%s", self.error, exc_info=error)
        self._count("errors", 1)
        if client is not None:
            self._lost[client] = time.monotonic() + RETRY_S
            if (episode := self._open.pop(client, None)) is not None:
                episode.close()


class _Episode:
    """An episode under way: its frames one after another in a file without a name."""

    def __init__(
        self,
        folder: Path,
        schema: Schema,
        task: str,
        row: Mapping[str, NDArray[Any]],
        began: float,
    ) -> None:
        self.schema, self.task = schema, task
        self._began = began
        fields = [(key, value.dtype, value.shape) for key, value in row.items()]
        self._layout = np.dtype([*fields, (SERVED_SECONDS, np.float32, (1,))])
        self._shapes = _shapes(row)
        self._frames = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(  # noqa: SIM115 - until `close`
            dir=folder, prefix=".episode-", buffering=0
        )

    def continues(self, row: Mapping[str, NDArray[Any]], task: str) -> bool:
        """Whether a frame belongs to this episode."""
        return task == self.task and _shapes(row) == self._shapes and self._frames < MAX_FRAMES

    def add(self, row: Mapping[str, NDArray[Any]], arrived: float) -> None:
        """Writes a frame.

        Raises:
            OSError: it cannot be written.
        """
        frame = np.zeros((), self._layout)
        for key, value in row.items():
            frame[key] = value
        frame[SERVED_SECONDS] = arrived - self._began
        data = memoryview(frame.tobytes())
        while data:
            data = data[self._file.write(data) :]
        self._frames += 1

    def recording(self) -> Recording:
        """All of it; the arrays are views of the file."""
        frames = np.memmap(self._file, self._layout, "r", shape=(self._frames,))
        return Recording(
            task=self.task,
            images={key: frames[key] for key in self.schema.cameras},
            columns={key: np.asarray(frames[key]) for key in self.schema.columns},
        )

    def close(self) -> None:
        """Frees its place on the disk."""
        self._file.close()


class _Writer:
    """Writes episodes as shards of a dataset, and its meta files now and then."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._schema: Schema | None = None  # of the dataset; None: not known yet
        self._shard = self._episode = 0
        self._stale = True  # there may be episodes that the meta files do not have
        self._finish_after = 0.0

    def write(self, episode: _Episode) -> None:
        """Raises Pi0Error if the episode does not fit the dataset or cannot be written."""
        schema = episode.schema
        if self._schema is None:
            self._shard, self._episode = next_place(self._folder, schema)
        elif schema != self._schema:
            raise Pi0Error(
                "recording: expected episodes of the same cameras and sizes, "
                f"{_sizes(self._schema)}, found {_sizes(schema)}. Record these robots to a "
                "folder of their own."
            )
        write_shard(self._folder, self._shard, self._episode, [episode.recording()], schema)
        self._schema, self._stale = schema, True
        self._shard, self._episode = self._shard + 1, self._episode + 1
        if time.monotonic() >= self._finish_after:
            self.finish()

    def seconds_to_finish(self) -> float | None:
        """How long the meta files may go without the last episodes; None: they have all."""
        return max(0.0, self._finish_after - time.monotonic()) if self._stale else None

    def finish(self) -> None:
        """Writes the meta files if there are new episodes."""
        if not self._stale:
            return
        schema = self._schema or written_schema(self._folder)
        if schema is None:
            return
        start = time.monotonic()
        finish(self._folder, schema)
        self._stale = False
        end = time.monotonic()
        self._finish_after = end + (end - start) / FINISH_SHARE


def require_own(folder: Path, pipeline: Pipeline) -> None:
    """Whether a server can go on with a folder, as far as it shows before there are pictures.

    Raises:
        Pi0Error: its episodes are another robot's or not of a server, or a file is damaged.
    """
    there = written_schema(folder)
    if there is None:
        return
    ours = _schema(pipeline, there.cameras, len(there.columns.get(STATE, ())) or 1)
    if there.to_json() != ours.to_json():
        raise Pi0Error(
            f"--record: expected in {folder} episodes of a server for robot {ours.robot} at "
            f"{ours.fps} Hz, of the same actions and horizon, found others, of robot {there.robot} "
            f"at {there.fps} Hz. Name another folder."
        )


def _schema(pipeline: Pipeline, cameras: Mapping[str, tuple[int, int]], states: int) -> Schema:
    """What episodes of a server share whose robots have these pictures and numbers of states."""
    robot = pipeline.robot
    actions = robot.action_names or tuple(f"action_{i}" for i in range(pipeline.action_dim))
    return Schema(
        fps=max(1, round(robot.control_hz or DEFAULT_FPS)),
        robot=robot.name,
        cameras=cameras,
        columns={
            STATE: tuple(f"state_{i}" for i in range(states)),
            ACTION: actions,
            CHUNK: tuple(f"{name}_{k}" for k in range(pipeline.config.horizon) for name in actions),
            SERVED_SECONDS: ("seconds",),
        },
    )


def _picture_features(keys: list[str]) -> dict[str, str]:
    """Camera key → feature of the dataset: the last part of the key, if that tells them apart."""
    ends = [key.rpartition("/")[2] for key in keys]
    names = ends if len(set(ends)) == len(ends) else [key.replace("/", "_") for key in keys]
    return {key: PICTURES + name for key, name in zip(keys, names, strict=True)}


def _sizes(schema: Schema) -> str:
    cameras = [f"{name} {height}×{width}" for name, (height, width) in schema.cameras.items()]
    return f"{', '.join(cameras)} and {len(schema.columns[STATE])} state values"


def _shapes(row: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in row.items()}


def _for_video(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Without an odd last row or column, which 4:2:0 video does not have; sides that are shorter
    than a video's repeat their last pixel."""
    height, width = (max(LEAST_SIDE, side // 2 * 2) for side in picture.shape[:2])
    picture = picture[:height, :width]
    below, beside = height - picture.shape[0], width - picture.shape[1]
    if below or beside:
        return np.pad(picture, ((0, below), (0, beside), (0, 0)), "edge")
    return picture


def _yield_to_others() -> None:
    """This thread computes when nobody else wants to, and so do those that it starts."""
    if sys.platform == "linux":  # where each thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
