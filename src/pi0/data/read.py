"""Reading a LeRobotDataset v3 folder, ours or LeRobot's: columns in memory, pictures on disk.

Rows are the dataset's frames, episode by episode. What opening does not need is read when it is
asked for, so that `check` can speak of a damaged folder. Source of the format: LeRobot 0.6.1,
`datasets/dataset_metadata.py`, `dataset_reader.py` and `io_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.checkpoint.files import read_json
from pi0.checkpoint.outputs import expand_user
from pi0.data.check import check
from pi0.data.columns import RowError, column_names, index_columns, read_column, read_table
from pi0.data.frames import FrameStore, open_frames
from pi0.data.schema import INFO, TASKS, VERSION, VIDEO, Array
from pi0.errors import CheckpointError, DataError
from pi0.findings import Finding

__all__ = ["Dataset", "FrameStore"]

CONVERT = (
    "LeRobot converts it: python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=NAME "
    "--root=FOLDER --push-to-hub=false."
)


class Dataset:
    """A LeRobotDataset v3 folder.

    Attributes:
        root: the folder.
        info: meta/info.json.
        fps: frames per second.
        robot: the robot's name, if the dataset says one.
        cameras: feature keys of the cameras that have colour; depth is left out.
        names: column → names of its values; empty where the dataset has none.
        episodes: [E] the number of each episode.
        episode_starts: [E + 1] the frame with which each episode begins, and the end.
    """

    def __init__(self, root: Path, info: Mapping[str, Any], files: list[Path]) -> None:
        self.root = root
        self.info = info
        self._files = files
        self._features = _features(root, info)
        self.fps = _fps(root, info)
        robot = info.get("robot_type")
        self.robot = robot if isinstance(robot, str) else None
        self.cameras = tuple(
            key
            for key, feature in self._features.items()
            if feature.get("dtype") in ("video", "image") and not _is_depth(feature)
        )
        self.names = {
            key: _flat_names(feature.get("names"))
            for key, feature in self._features.items()
            if _is_numeric(feature)
        }
        stored = read_column(files, "episode_index", (1,))[:, 0]
        if len(stored) and stored.dtype.kind not in "iu":
            raise DataError(
                f"{root}: expected whole numbers as episode_index, found {stored.dtype}."
            )
        # Files are read in the order of their names; an episode in two of them is put together.
        self._order = None if (np.diff(stored) >= 0).all() else np.argsort(stored, kind="stable")
        ordered = stored if self._order is None else stored[self._order]
        self.episodes, starts = np.unique(ordered, return_index=True)
        self.episode_starts: NDArray[np.int64] = np.append(starts, len(ordered)).astype(np.int64)
        self._columns: dict[str, Array] = {}

    @classmethod
    def open(cls, root: Path) -> Dataset:
        """Opens a folder; pictures are not looked at.

        Raises:
            DataError: it is no such folder, or one that cannot be read.
        """
        root = expand_user(root)
        if not root.is_dir():
            raise DataError(f"{root}: expected the folder of a dataset, found no folder.")
        if not (root / INFO).is_file():
            raise DataError(f"{root}: expected a LeRobotDataset, found no {INFO}.{_hint(root)}")
        try:
            info = read_json(root / INFO)
        except CheckpointError as error:
            raise DataError(str(error)) from error
        _require_version(root, info)
        files = sorted(root.glob("data/*/*.parquet"))
        if not files and info.get("total_frames"):
            raise DataError(
                f"{root}: expected data/chunk-…/file-….parquet, found none. Copy or download the "
                "whole folder."
            )
        return cls(root, info, files)

    @property
    def num_episodes(self) -> int:
        """Episodes, E."""
        return len(self.episodes)

    @property
    def num_frames(self) -> int:
        """Frames of all episodes, N."""
        return int(self.episode_starts[-1])

    @cached_property
    def tasks(self) -> NDArray[np.object_]:
        """[N] the sentence of each frame.

        Raises:
            DataError: a frame names a task that has no text.
        """
        texts = self.task_texts
        index = self.column("task_index")[:, 0]
        numbers, of_row = np.unique(index, return_inverse=True)
        for number in numbers.tolist():
            if not texts.get(number, "").strip():
                row = int(np.flatnonzero(index == number)[0])
                found = "an empty text" if number in texts else "no such task"
                raise DataError(
                    f"{self.place(row)}: expected the text of task {number} in "
                    f"{self.root / TASKS}, found {found}."
                )
        lookup = np.array([texts[number] for number in numbers.tolist()], object)
        out: NDArray[np.object_] = lookup[of_row]
        return out

    @cached_property
    def task_texts(self) -> dict[int, str]:
        """task_index → sentence.

        Raises:
            DataError: meta/tasks.parquet cannot be read.
        """
        path = self.root / TASKS
        if not path.is_file():
            raise DataError(f"{path}: expected the dataset's tasks, found no file.")
        # The sentences are the index of a pandas table, which may have any name and is its last
        # column; tables that others wrote may have more.
        names = [name for name in column_names(path) if name != "task_index"]
        known = [name for name in (*index_columns(path), "task") if name in names]
        chosen = known[:1] or names[-1:]
        table = read_table(path, ["task_index", *chosen])
        try:
            texts = table[chosen[0]].to_pylist() if chosen else []
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: expected texts in UTF-8, found {error}.") from error
        return {
            number: text if isinstance(text, str) else ""
            for number, text in zip(table["task_index"].to_pylist(), texts, strict=True)
        }

    def column(self, key: str) -> Array:
        """A whole column [N, D] in memory (a tensor [N, …]), in the stored dtype; read-only.

        Raises:
            DataError: there is no such column, or a row of it has another width.
        """
        if key not in self._columns:
            if key not in self.names:
                raise DataError(
                    f"column {key}: expected one of {', '.join(self.names)}, which {self.root} "
                    "has, found another name."
                )
            try:
                values = read_column(self._files, key, self._features[key]["shape"] or (1,))
            except RowError as error:
                raise DataError(
                    f"{self.place(self._row(error.row))}: {key}: {error.fault}"
                ) from None
            values = values if self._order is None else values[self._order]
            values.flags.writeable = False
            self._columns[key] = values
        return self._columns[key]

    def frames(
        self,
        key: str,
        size: int | None = None,
        resize: str = "openpi",
        cache: Path | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> FrameStore:
        """All pictures of a camera, decoded once into a cache on disk.

        Args:
            size: side in pixels; None: as they are.
            resize: "openpi" or "lerobot", the policy's own resizing (`policy/images.py`), which
                keeps the aspect ratio; the result is rounded to 8 bits.
            cache: a folder; None: .cache/pi0 in the dataset's.
            progress: called with the number of frames done since the last call.

        Raises:
            DataError: no such camera; or a picture that is missing, damaged or of another size:
                names episode and frame.
            Pi0Error: the cache cannot be written.
        """
        return open_frames(self, key, size, resize, cache, progress)

    def check(self, decode: bool = True, used: Collection[str] | None = None) -> list[Finding]:
        """Everything that is wrong with the data; each finding names episode and frame.

        Args:
            decode: also decode every picture, which takes as long as the first `frames`.
            used: columns and cameras; what is wrong with others is a warning. None: all.
        """
        return check(self, decode, used)

    # For the modules that know pictures and faults.

    def place(self, row: int) -> str:
        """Where a frame is, for messages: "episode 3, frame 17"."""
        number = int(np.searchsorted(self.episode_starts, row, "right")) - 1
        return f"episode {self.episodes[number]}, frame {row - self.episode_starts[number]}"

    def is_video(self, key: str) -> bool:
        """Whether a camera's pictures are in videos, not in the parquet files."""
        return bool(self._features[key]["dtype"] == "video")

    def picture_size(self, key: str) -> tuple[int, int]:
        """Height and width that the dataset states for a camera."""
        names = _flat_names(self._features[key].get("names"))
        shape = self._features[key]["shape"]
        if "height" in names and "width" in names:
            return shape[names.index("height")], shape[names.index("width")]
        return (shape[1], shape[2]) if shape[0] == 3 else (shape[0], shape[1])

    def video_file(self, key: str, chunk: int, file: int) -> Path:
        """Where a video lies."""
        template = str(self.info.get("video_path") or VIDEO)
        try:
            name = template.format(video_key=key, chunk_index=chunk, file_index=file)
        except (LookupError, ValueError) as error:
            raise DataError(
                f"{self.root / INFO}: expected a video_path such as {VIDEO}, found {template!r}."
            ) from error
        return self.root / name

    def files_and_rows(self) -> list[tuple[Path, NDArray[np.int64]]]:
        """The parquet files, and the frames that each holds, in its order."""
        position = np.arange(self.num_frames)
        if self._order is not None:
            position[self._order] = np.arange(self.num_frames)
        out, start = [], 0
        for file in self._files:
            rows = len(read_table(file, ["episode_index"]))
            out.append((file, position[start : start + rows]))
            start += rows
        return out

    def episode_column(self, key: str) -> NDArray[np.float64]:
        """[E] a number of each episode from meta/episodes.

        Raises:
            DataError: an episode is not listed there.
        """
        files = sorted(self.root.glob("meta/episodes/*/*.parquet"))
        listed = read_column(files, "episode_index", (1,))[:, 0]
        values = read_column(files, key, (1,))[:, 0]
        missing = np.setdiff1d(self.episodes, listed)
        if missing.size:
            raise DataError(
                f"{self.root / 'meta/episodes'}: expected episode {missing[0]}, which is in the "
                "data, found no entry. Copy or download the whole folder."
            )
        order = np.argsort(listed, kind="stable")
        for episode in np.intersect1d(
            listed[order][1:][np.diff(listed[order]) == 0], self.episodes
        ):
            raise DataError(
                f"{self.root / 'meta/episodes'}: expected one entry of episode {episode}, found "
                "several. Copy or download the whole folder."
            )
        out: NDArray[np.float64] = values[order][np.searchsorted(listed[order], self.episodes)]
        for episode in self.episodes[~np.isfinite(out)][:1]:
            raise DataError(
                f"episode {episode}: expected a number as {key} in {self.root / 'meta/episodes'}, "
                "found none."
            )
        return out

    def _row(self, stored: int) -> int:
        """The frame that is in a row of the files."""
        return stored if self._order is None else int(np.flatnonzero(self._order == stored)[0])


def _features(root: Path, info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    features = info.get("features")
    if not isinstance(features, dict) or "episode_index" not in features:
        raise DataError(f"{root / INFO}: expected features with episode_index, found none.")
    for key, feature in features.items():
        table = feature if isinstance(feature, dict) else {}
        picture = table.get("dtype") in ("video", "image")
        if table and not (picture or _is_numeric(table)):
            continue  # texts
        shape: Any = table.get("shape")
        fits = isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape)
        if not fits or (picture and len(shape) != 3):
            raise DataError(
                f"{root / INFO}: {key}: expected a dtype and a shape, found {feature!r}."
            )
    return features


def _fps(root: Path, info: Mapping[str, Any]) -> int:
    fps = info.get("fps")
    if not isinstance(fps, (int, float)) or not float(fps).is_integer() or fps <= 0:
        raise DataError(f"{root / INFO}: expected fps as a whole number above 0, found {fps!r}.")
    return int(fps)


def _require_version(root: Path, info: Mapping[str, Any]) -> None:
    version = str(info.get("codebase_version"))
    if version.startswith("v3."):
        return
    remedy = CONVERT if version == "v2.1" else ""
    if version.startswith(("v1.", "v2.")) and not remedy:
        remedy = "Convert it to v2.1 with the LeRobot of its time, then to v3.0."
    fault = f"expected a LeRobotDataset {VERSION}, found codebase_version {version}."
    raise DataError(f"{root}: {fault} {remedy}".rstrip())


def _hint(root: Path) -> str:
    if any(root.glob("data/*/*.parquet")):
        return " It has shards, but is not finished: pi0.data.finish writes the meta files."
    inside = [path.parent.parent for path in root.glob(f"*/{INFO}")]
    return f" There is one in {inside[0]}." if inside else ""


def _is_numeric(feature: Mapping[str, Any]) -> bool:
    try:
        return np.dtype(feature.get("dtype")).kind in "fiub" and feature.get("dtype") is not None
    except TypeError:
        return False


def _is_depth(feature: Mapping[str, Any]) -> bool:
    tables = [
        table for name in ("info", "video_info") if isinstance(table := feature.get(name), dict)
    ]
    return any(t.get("is_depth_map") or t.get("video.is_depth_map") for t in tables)


def _flat_names(names: Any) -> tuple[str, ...]:
    """LeRobot's names: a list, or lists under a heading such as "motors"."""
    if isinstance(names, dict):
        names = list(names.values())
    if isinstance(names, (list, tuple)):
        return tuple(name for part in names for name in _flat_names(part))
    return (str(names),) if names is not None else ()
