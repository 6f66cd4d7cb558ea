"""The meta files of a dataset: info.json, tasks.parquet, episodes and stats.json.

info.json is written last: a folder without it is not finished. Source of the forms: LeRobot 0.6.1,
`datasets/utils.py` (DatasetInfo), `dataset_metadata.py`, `video_utils.py` (get_video_info),
`compute_stats.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pi0.checkpoint.outputs import replacing
from pi0.data.schema import (
    BOOKKEEPING,
    DATA,
    EPISODES,
    FILES_PER_CHUNK,
    INFO,
    STATS,
    TASKS,
    VERSION,
    VIDEO,
    Schema,
    file_indices,
    video_path,
)
from pi0.data.statistics import PixelStatistics, RunningStatistics
from pi0.data.video import SETTINGS, inspect_video

if TYPE_CHECKING:
    from pi0.data.write import Shard

FILE_SIZES_MB = {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}  # LeRobot's defaults


def write_meta(root: Path, schema: Schema, shards: Sequence[Shard], tasks: Sequence[str]) -> None:
    """Writes all of them; tasks are in the order of their task_index."""
    total = {key: RunningStatistics() for key in shards[0].table.column_names}
    rows = [row for shard in shards for row in _episodes(schema, shard, total)]
    start = 0
    for row in rows:
        row["dataset_from_index"], start = start, start + row["length"]
        row["dataset_to_index"] = start
        row |= {f"meta/episodes/{name}": number for name, number in file_indices(0).items()}
    _write_table(root / TASKS, _tasks_table(tasks))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    _write_table(root / EPISODES.format(**file_indices(0)), pa.table(columns))
    _write_json(root / STATS, _dataset_statistics(schema, shards, total))
    info = {
        "codebase_version": VERSION,
        "fps": schema.fps,
        "features": _features(root, schema, shards[0]),
        "total_episodes": len(rows),
        "total_frames": start,
        "total_tasks": len(tasks),
        "chunks_size": FILES_PER_CHUNK,
        **FILE_SIZES_MB,
        "data_path": DATA,
        "video_path": VIDEO if schema.cameras else None,
        "robot_type": schema.robot,
        "splits": {"train": f"0:{len(rows)}"},
    }
    _write_json(root / INFO, info)


def _episodes(
    schema: Schema, shard: Shard, total: Mapping[str, RunningStatistics]
) -> Iterable[dict[str, Any]]:
    """A row for each episode of a shard; its columns go into `total`."""
    where = file_indices(shard.index)
    start = 0
    for number, (task, length) in enumerate(zip(shard.tasks, shard.lengths, strict=True)):
        row = {
            "episode_index": shard.first_episode + number,
            "tasks": [task],
            "length": length,
            **{f"data/{name}": value for name, value in where.items()},
            "dataset_from_index": 0,
            "dataset_to_index": 0,
        }
        for key in schema.cameras:
            row |= {f"videos/{key}/{name}": value for name, value in where.items()}
            row[f"videos/{key}/from_timestamp"] = start / schema.fps
            row[f"videos/{key}/to_timestamp"] = (start + length) / schema.fps
            statistics = shard.pixels[key]["episodes"][number]
            row |= {f"stats/{key}/{name}": _as_pixels(name, v) for name, v in statistics.items()}
        for key in shard.table.column_names:
            values = _values(shard.table[key].slice(start, length))
            total[key].update(values)
            episode = RunningStatistics()
            episode.update(values)
            row |= {f"stats/{key}/{name}": v.tolist() for name, v in episode.result().items()}
        start += length
        yield row


def _values(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """[T, D] of a column as `write_shard` stores it."""
    array = column.combine_chunks()
    flat = array.flatten() if pa.types.is_fixed_size_list(array.type) else array
    numbers: NDArray[Any] = flat.to_numpy(zero_copy_only=False)
    return numbers.astype(np.float64).reshape(len(array), -1)


def _dataset_statistics(
    schema: Schema, shards: Sequence[Shard], total: Mapping[str, RunningStatistics]
) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for key in schema.cameras:
        pixels = PixelStatistics()
        for shard in shards:
            found = shard.pixels[key]
            pixels.merge(found["pictures"], np.asarray(found["counts"]))
        out[key] = {name: _as_pixels(name, v.tolist()) for name, v in pixels.result().items()}
    for key, statistics in total.items():
        out[key] = {name: v.tolist() for name, v in statistics.result().items()}
    return out


def _as_pixels(name: str, values: list[Any]) -> list[Any]:
    """LeRobot's shape of statistics of pictures: [3, 1, 1], and [1] for the count."""
    return values if name == "count" else [[[value]] for value in values]


def _features(root: Path, schema: Schema, shard: Shard) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {}
    for key, (height, width) in schema.cameras.items():
        video = inspect_video(video_path(root, key, shard.index))
        features[key] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": video.height,
                "video.width": video.width,
                "video.codec": video.codec,
                "video.pix_fmt": video.pixels,
                "video.fps": schema.fps,
                "video.channels": 3,
                "has_audio": False,
                **{f"video.{name}": value for name, value in SETTINGS.items()},
                "video.extra_options": {},
                "video.video_backend": "pyav",
                "is_depth_map": False,
            },
        }
    for key, names in schema.columns.items():
        kind = shard.table.schema.field(key).type
        value = kind.value_type if pa.types.is_fixed_size_list(kind) else kind
        # Before pyarrow 26, `to_pandas_dtype` wants pandas installed.
        dtype = pa.array([], value).to_numpy(zero_copy_only=False).dtype.name
        features[key] = {"dtype": dtype, "shape": [len(names)], "names": list(names)}
    for key, dtype in BOOKKEEPING.items():
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def _tasks_table(tasks: Sequence[str]) -> pa.Table:
    """The sentences are the index of a pandas table, which LeRobot reads it as."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": list(tasks)})
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    description = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype,
             "metadata": None}
            for name, (kind, dtype) in kinds.items()
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": None,
    }  # fmt: skip
    return table.replace_schema_metadata({"pandas": json.dumps(description)})


def _write_table(path: Path, table: pa.Table) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="snappy")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=4, ensure_ascii=False), encoding="utf-8")
