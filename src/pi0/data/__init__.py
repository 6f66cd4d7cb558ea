"""Recorded episodes: LeRobotDataset v3 folders, read, written and checked (docs/data.md)."""

from pi0.errors import DataError, install_hint

try:
    import av  # noqa: F401
    import pyarrow  # noqa: F401
except ImportError as missing:
    raise DataError(
        "datasets: expected the packages pyarrow and av, which the extra pi0[train] brings, found "
        f"no {missing.name}. {install_hint('train')}"
    ) from missing

from pi0.data.frames import FrameStore
from pi0.data.read import Dataset
from pi0.data.schema import Recording, Schema
from pi0.data.statistics import RunningStatistics, norm_stats_json
from pi0.data.write import (
    finish,
    next_place,
    remove_shard,
    shard_episodes,
    write_shard,
    written_schema,
)

__all__ = [
    "Dataset",
    "FrameStore",
    "Recording",
    "RunningStatistics",
    "Schema",
    "finish",
    "next_place",
    "norm_stats_json",
    "remove_shard",
    "shard_episodes",
    "write_shard",
    "written_schema",
]
