"""What a LeRobotDataset v3 folder is made of: where its files lie, and what an episode holds.

Source of the names: LeRobot 0.6.1, `datasets/utils.py` and `utils/constants.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.errors import DataError

Array = NDArray[Any]
Picture = NDArray[np.uint8]  # [H, W, 3], RGB

VERSION = "v3.0"
FILES_PER_CHUNK = 1000
LEAST_SIDE = 4  # of a picture that the encoder takes, in pixels
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES = f"meta/episodes/{_FILE}.parquet"
DATA = f"data/{_FILE}.parquet"
VIDEO = "videos/{video_key}/" + f"{_FILE}.mp4"
# Columns of recordings: of a robot's; of `pi0 serve`, since an episode's first observation.
STATE, ACTION, SERVED_SECONDS = "observation.state", "action", "served.seconds"
# Columns that every dataset has, and their dtypes.
BOOKKEEPING = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64",
               "index": "int64", "task_index": "int64"}  # fmt: skip
# How the kinds of numpy's dtypes are stored.
STORED: dict[str, np.dtype[Any]] = {
    "f": np.dtype("float32"),
    "i": np.dtype("int64"),
    "u": np.dtype("int64"),
    "b": np.dtype("bool"),
}


def file_indices(shard: int) -> dict[str, int]:
    """chunk_index and file_index of a shard, for the templates above."""
    chunk, file = divmod(shard, FILES_PER_CHUNK)
    return {"chunk_index": chunk, "file_index": file}


def data_path(root: Path, shard: int) -> Path:
    """The parquet file of a shard."""
    return root / DATA.format(**file_indices(shard))


def video_path(root: Path, key: str, shard: int) -> Path:
    """The video file of a camera in a shard."""
    return root / VIDEO.format(video_key=key, **file_indices(shard))


@dataclass(frozen=True)
class Recording:
    """One episode of T frames.

    Attributes:
        task: the sentence.
        images: feature key, such as "observation.images.base" → [T, H, W, 3] uint8, RGB.
        columns: feature key, such as "observation.state" → [T, D], or [T] for one value.
    """

    task: str
    images: Mapping[str, Picture]
    columns: Mapping[str, Array]

    @property
    def length(self) -> int:
        """Frames, T."""
        arrays = [*self.columns.values(), *self.images.values()]
        return len(arrays[0]) if arrays else 0

    def column(self, key: str) -> Array:
        """[T, D] in the dtype in which it is stored: float32, int64 or bool."""
        values = np.asarray(self.columns[key])
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, and is refused
            stored: Array = values.reshape(len(values), -1).astype(STORED[values.dtype.kind])
        return stored


@dataclass(frozen=True)
class Schema:
    """What all episodes of a dataset share.

    Attributes:
        fps: frames per second.
        robot: the robot's name, `robot_type` of LeRobot.
        cameras: feature key → (height, width) in pixels, both even and at least 4.
        columns: feature key → the names of its values.

    Raises:
        DataError: sizes or keys that the format or its video codec does not have.
    """

    fps: int
    robot: str
    cameras: Mapping[str, tuple[int, int]]
    columns: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not (isinstance(self.fps, int) and self.fps > 0):
            raise DataError(f"fps: expected a whole number above 0, found {self.fps!r}.")
        for key in [*self.cameras, *self.columns]:
            if "/" in key or not key or key in BOOKKEEPING:
                raise DataError(
                    f"feature {key!r}: expected a name without '/' that the format does not use "
                    f"itself ({', '.join(BOOKKEEPING)}). Rename it."
                )
        if both := set(self.cameras) & set(self.columns):
            raise DataError(f"feature {min(both)!r}: expected a camera or a column, found both.")
        for key, size in self.cameras.items():
            if any(side < LEAST_SIDE or side % 2 for side in size):
                raise DataError(
                    f"camera {key}: expected an even height and width of at least {LEAST_SIDE} "
                    f"pixels, as 4:2:0 video has them, found {size[0]}×{size[1]}. Crop or pad its "
                    "pictures."
                )
        for key, names in self.columns.items():
            if not names:
                raise DataError(f"column {key}: expected the names of its values, found none.")

    def to_json(self) -> str:
        """A text that is equal for equal schemas."""
        return json.dumps(asdict(self), sort_keys=True)

    def require(self, episode: int, recording: Recording) -> None:
        """Raises DataError if a recording is not what this schema says; names episode and frame."""
        if not recording.task.strip():
            raise DataError(f"episode {episode}: expected a task in words, found none.")
        what = f"episode {episode}"
        _require_keys(f"{what}: images", self.cameras, recording.images)
        _require_keys(f"{what}: columns", self.columns, recording.columns)
        frames = recording.length
        if not frames:
            raise DataError(f"{what}: expected at least one frame, found none.")
        for key, size in self.cameras.items():
            found = recording.images[key]
            if found.shape != (frames, *size, 3) or found.dtype != np.uint8:
                raise DataError(
                    f"{what}: {key}: expected uint8 {[frames, *size, 3]}, found {found.dtype} "
                    f"{list(found.shape)}."
                )
        for key, names in self.columns.items():
            self._require_column(what, key, recording, (frames, len(names)))

    def _require_column(
        self, what: str, key: str, recording: Recording, shape: tuple[int, int]
    ) -> None:
        values = np.asarray(recording.columns[key])
        shapes = (shape, shape[:1]) if shape[1] == 1 else (shape,)
        if values.dtype.kind not in STORED or values.shape not in shapes:
            raise DataError(
                f"{what}: {key}: expected numbers {list(shape)}, found {values.dtype} "
                f"{list(values.shape)}."
            )
        bad = np.flatnonzero(~np.isfinite(recording.column(key)).all(axis=1))
        if bad.size:
            raise DataError(
                f"{what}, frame {bad[0]}: {key}: expected finite numbers, found "
                f"{values[bad[0]].tolist()}."
            )


def _require_keys(what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    if set(expected) != set(found):
        raise DataError(
            f"{what}: expected {', '.join(sorted(expected)) or 'none'}, found "
            f"{', '.join(sorted(found)) or 'none'}."
        )
