"""Writing a LeRobotDataset v3 folder: shards by any number of processes, then its meta files.

A shard is one parquet file and one video for each camera. The parquet file appears last and carries
what `finish` needs, so that it alone says whether a shard is complete. What a process cannot know
of the others' shards (a frame's number in the dataset, a task's) is counted within the shard, until
`finish` puts the dataset's own numbers there.

Source of the format: LeRobot 0.6.1, `datasets/dataset_writer.py` and `dataset_metadata.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pi0.checkpoint.files import read_json
from pi0.checkpoint.outputs import remove_temporaries, replacing
from pi0.data.columns import open_parquet
from pi0.data.meta import write_meta
from pi0.data.schema import (
    BOOKKEEPING,
    FILES_PER_CHUNK,
    INFO,
    Array,
    Picture,
    Recording,
    Schema,
    data_path,
    video_path,
)
from pi0.data.statistics import PixelStatistics
from pi0.data.video import inspect_video, sync, write_video
from pi0.errors import ConfigError, DataError

__all__ = [
    "Recording",
    "Schema",
    "begin",
    "finish",
    "next_place",
    "remove_shard",
    "shard_episodes",
    "write_shard",
    "written_schema",
]

OPTIONS = "meta/recorded_with.json"
RECORD_ANEW = "Delete it and run again, which records its episodes anew."
SHARD = b"pi0.shard"  # in the parquet file's metadata: JSON, see `Shard`


@dataclass(frozen=True)
class Shard:
    """A shard as `finish` reads it.

    Attributes:
        tasks: the sentence of each of its episodes.
        lengths: their frames.
        pixels: camera → {"episodes": statistics of each, "pictures": …, "counts": [3][256]}.
    """

    index: int
    table: pa.Table
    first_episode: int
    tasks: list[str]
    lengths: list[int]
    pixels: dict[str, Any]


def begin(root: Path, options: Mapping[str, Any]) -> None:
    """Notes what a dataset is recorded with, as plain data, for those that go on with it, and
    removes what a process that was killed left half-written.

    Raises:
        ConfigError: it was begun with others.
        Pi0Error: the note cannot be read or written.
    """
    path = root / OPTIONS
    now = json.loads(json.dumps(options))  # lists for tuples
    begun = path.is_file() and any(root.glob("data/*/*.parquet"))
    before = read_json(path) if begun else now
    for name, value in now.items():
        if before.get(name) != value:
            raise ConfigError(
                f"{root}: {name}: expected {before.get(name)}, with which its episodes were "
                f"recorded, found {value}. Go on with the same options, or name another folder."
            )
    remove_temporaries(root)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(now, indent=4), encoding="utf-8")


def shard_episodes(root: Path, index: int) -> int:
    """How many episodes a shard holds; 0: there is none, or a part of one.

    Raises:
        DataError: a file of it is damaged, or another's.
    """
    path = data_path(root, index)
    if not path.is_file():
        return 0
    with open_parquet(path, RECORD_ANEW) as parquet:
        described, frames = _described(path, parquet.schema_arrow), len(parquet.read())
    for key in described["pixels"]:
        video = video_path(root, key, index)
        if not video.is_file():
            return 0
        try:
            found = len(inspect_video(video).times)
        except DataError as error:
            raise DataError(f"{error} {RECORD_ANEW}") from error
        if found != frames:
            raise DataError(f"{video}: expected {frames} frames, found {found}. {RECORD_ANEW}")
    return len(described["lengths"])


def remove_shard(root: Path, index: int) -> None:
    """Removes what there is of a shard, so that another can be written in its place."""
    data_path(root, index).unlink(missing_ok=True)


def written_schema(root: Path) -> Schema | None:
    """What the episodes of a folder were written with; None: it has none.

    Raises:
        DataError: a file of it is damaged, or it holds somebody else's dataset.
    """
    schema = None
    for path in sorted(root.glob("data/*/*.parquet")):
        with open_parquet(path) as parquet:
            schema = json.loads(_described(path, parquet.schema_arrow)["schema"])
    if schema is None and (root / INFO).exists():
        raise DataError(
            f"{root}: expected a new folder or a dataset written by pi0, found {INFO} without its "
            "episodes. Name another folder."
        )
    return schema and Schema(
        schema["fps"],
        schema["robot"],
        *({key: tuple(inner) for key, inner in schema[k].items()} for k in ("cameras", "columns")),
    )


def next_place(root: Path, schema: Schema) -> tuple[int, int]:
    """The index of the shard after those that are there, and the number of its first episode.

    Raises:
        DataError: the shards that are there were written with another schema, or one is missing.
    """
    shards = list(_read_shards(root, schema))
    return (shards[-1].index + 1 if shards else 0), sum(len(shard.tasks) for shard in shards)


def write_shard(
    root: Path, index: int, first_episode: int, recordings: Sequence[Recording], schema: Schema
) -> None:
    """Writes some episodes; other processes may write other shards meanwhile.

    Args:
        index: of the shard, 0, 1, …; shards hold the episodes in this order.
        first_episode: the number of the first of these episodes in the dataset.

    Raises:
        DataError: a recording does not fit the schema, or the shard exists.
        Pi0Error: a file cannot be written.
    """
    path = data_path(root, index)
    if path.is_file():
        raise DataError(f"{path}: expected no such shard yet, found one. Take another index.")
    if not recordings:
        raise DataError(f"{path}: expected at least one episode, found none.")
    for number, recording in enumerate(recordings, first_episode):
        schema.require(number, recording)
    pixels = {key: _write_pictures(root, index, key, recordings, schema) for key in schema.cameras}
    table = _table(first_episode, recordings, schema)
    described = {
        "schema": schema.to_json(),
        "first_episode": first_episode,
        "tasks": [recording.task for recording in recordings],
        "lengths": [recording.length for recording in recordings],
        "pixels": pixels,
    }
    _write_episodes(path, table.replace_schema_metadata({SHARD: json.dumps(described)}))


def finish(root: Path, schema: Schema) -> None:
    """Writes the meta files for all shards that are there; may be called again after more shards.

    Raises:
        DataError: there is no shard, one is missing, or one was written with another schema.
        Pi0Error: a file cannot be written.
    """
    shards = list(_read_shards(root, schema))
    if not shards:
        raise DataError(f"{root}: expected shards to finish, found none.")
    tasks = {task: 0 for shard in shards for task in shard.tasks}
    tasks = {task: number for number, task in enumerate(tasks)}
    frames = 0
    for position, shard in enumerate(shards):
        numbers = np.arange(frames, frames + len(shard.table))
        task_index = np.repeat([tasks[task] for task in shard.tasks], shard.lengths)
        table = shard.table
        for key, values in (("index", numbers), ("task_index", task_index)):
            place = table.column_names.index(key)
            table = table.set_column(place, key, _to_arrow(values[:, None]))
        if not table.equals(shard.table):
            _write_episodes(data_path(root, shard.index), table)
        shards[position] = replace(shard, table=table)
        frames += len(table)
    write_meta(root, schema, shards, list(tasks))


def _write_pictures(
    root: Path, index: int, key: str, recordings: Sequence[Recording], schema: Schema
) -> dict[str, Any]:
    """Writes the video of a camera and gives the statistics of its pictures."""
    total, episodes = PixelStatistics(), []

    def pictures() -> Iterator[Picture]:
        for recording in recordings:
            episode = PixelStatistics()
            for picture in recording.images[key]:
                episode.update(picture)
                yield picture
            total.merge(episode.pictures, episode.counts)
            episodes.append(_to_lists(episode.result()))

    write_video(video_path(root, key, index), pictures(), schema.fps, schema.cameras[key])
    return {"episodes": episodes, "pictures": total.pictures, "counts": total.counts.tolist()}


def _to_lists(statistics: Mapping[str, NDArray[Any]]) -> dict[str, list[Any]]:
    return {name: values.tolist() for name, values in statistics.items()}


def _table(first_episode: int, recordings: Sequence[Recording], schema: Schema) -> pa.Table:
    lengths = [recording.length for recording in recordings]
    frame = np.concatenate([np.arange(length) for length in lengths])
    episode = np.repeat(np.arange(first_episode, first_episode + len(lengths)), lengths)
    columns: dict[str, Array] = {
        key: np.concatenate([recording.column(key) for recording in recordings])
        for key in schema.columns
    }
    columns |= {
        "timestamp": (frame / schema.fps)[:, None],
        "frame_index": frame[:, None],
        "episode_index": episode[:, None],
        "index": np.arange(len(frame))[:, None],
        "task_index": np.zeros((len(frame), 1), np.int64),
    }
    for key, dtype in BOOKKEEPING.items():
        columns[key] = columns[key].astype(dtype)
    return pa.table({key: _to_arrow(values) for key, values in columns.items()})


def _to_arrow(values: Array) -> pa.Array:
    """[N, D] as LeRobot stores it: numbers if D is 1, else lists of D."""
    flat = pa.array(values.ravel())
    return (
        flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    )


def _write_episodes(path: Path, table: pa.Table) -> None:
    """One row group for each episode, as LeRobot has them."""
    episode = table["episode_index"].to_numpy()
    starts = [0, *(np.flatnonzero(np.diff(episode)) + 1), len(episode)]
    with replacing(path) as temporary:
        with pq.ParquetWriter(temporary, table.schema, compression="snappy") as writer:
            for start, end in pairwise(starts):
                writer.write_table(table.slice(start, end - start))
        sync(temporary)


def _read_shards(root: Path, schema: Schema) -> Iterator[Shard]:
    """In the order of their episodes; each is compared with the schema and its predecessor."""
    expected_episode, columns = 0, None
    digits = "[0-9][0-9][0-9]"
    indices = sorted(
        FILES_PER_CHUNK * int(path.parent.name[-3:]) + int(path.stem[-3:])
        for path in root.glob(f"data/chunk-{digits}/file-{digits}.parquet")
    )
    for index in indices:
        path = data_path(root, index)
        with open_parquet(path) as parquet:
            table = parquet.read()
        described = _described(path, table.schema)
        if described["schema"] != schema.to_json() or columns not in (None, table.schema.types):
            raise DataError(
                f"{path}: expected a shard of the same cameras, columns and frames per second as "
                "the others, found another's. Write it to another folder."
            )
        columns = table.schema.types
        if described["first_episode"] != expected_episode:
            raise DataError(
                f"{path}: expected episode {expected_episode} as its first, found "
                f"{described['first_episode']}. A shard before it is missing or has fewer episodes."
            )
        expected_episode += len(described["tasks"])
        described.pop("schema")
        yield Shard(index, table, **described)


def _described(path: Path, schema: pa.Schema) -> dict[str, Any]:
    """What `write_shard` noted in a parquet file."""
    if SHARD not in (schema.metadata or {}):
        raise DataError(
            f"{path}: expected a shard written by pi0, found another's file. Name another folder."
        )
    described: dict[str, Any] = json.loads(schema.metadata[SHARD])
    return described
