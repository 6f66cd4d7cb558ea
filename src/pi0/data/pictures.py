"""The pictures of a camera, wherever a dataset has them: in videos, or encoded in parquet files.

A frame of an episode is shown in its video at from_timestamp + timestamp (LeRobot 0.6.1,
`dataset_reader.py`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pi0.data.columns import open_parquet
from pi0.data.schema import Picture
from pi0.data.video import VideoInfo, decode_video, inspect_video
from pi0.errors import DataError

if TYPE_CHECKING:
    from pi0.data.read import Dataset

Rows = NDArray[np.int64]
# Of the time between two frames. LeRobot allows 1e-4 s, which timestamps in float32 exceed after
# half an hour.
TOLERANCE = 0.25


@dataclass(frozen=True)
class VideoPart:
    """The pictures in one video.

    Attributes:
        rows: [n] the dataset's frames in it.
        times: [n] when each of them is shown, in s.
    """

    dataset: Dataset
    path: Path
    rows: Rows
    times: NDArray[np.float64]

    def inspect(self) -> VideoInfo:
        """The video's index.

        Raises:
            DataError: there is no video; names episode and frame.
        """
        try:
            return inspect_video(self.path)
        except DataError as error:
            place = self.dataset.place(self.rows[0])
            raise DataError(f"{place} and on: {error}") from error

    def frame_numbers(self, video: VideoInfo) -> Rows:
        """[n] the video's frame for each row.

        Raises:
            DataError: the video has none at that time.
        """
        if not len(video.times):
            raise DataError(
                f"{self.dataset.place(self.rows[0])} and on: {self.path}: expected "
                f"{len(self.rows)} pictures, found an empty video. Copy or download it again."
            )
        number = nearest(video.times, self.times)
        distance = np.abs(video.times[number] - self.times)
        late = np.flatnonzero(~(distance <= TOLERANCE / self.dataset.fps))  # NaN, too
        if late.size:
            i = late[0]
            raise DataError(
                f"{self.path}: expected a picture at {self.times[i]:.3f} s for "
                f"{self.dataset.place(self.rows[i])}, found none nearer than "
                f"{video.times[number[i]]:.3f} s ({len(late)} of {len(self.rows)} frames have no "
                "picture). The video is too short, or another's: copy or download it again."
            )
        return number

    def pictures(self) -> Iterator[tuple[Rows, Picture]]:
        """Yields the rows that show a picture, and the picture.

        Raises:
            DataError: a picture is missing or cannot be decoded; names episode and frame.
        """
        video = self.inspect()
        number = self.frame_numbers(video)
        order = np.argsort(number, kind="stable")
        wanted, done = number[order], 0
        try:
            for time, picture in decode_video(self.path):
                shown = nearest(video.times, np.array([time]))[0]
                end = int(np.searchsorted(wanted, shown, "right"))
                if done < end and wanted[done] < shown:
                    break
                if done < end:
                    yield self.rows[order[done:end]], picture
                    done = end
                if done == len(wanted):
                    return
        except DataError as error:
            raise self._undecodable(order[done], str(error)) from error
        raise self._undecodable(
            order[done], f"{self.path}: expected this picture when decoding, found it left out."
        )

    def _undecodable(self, i: int, found: str) -> DataError:
        place = self.dataset.place(self.rows[i])
        return DataError(f"{place}: {found} Copy or download the video again.")


@dataclass(frozen=True)
class ParquetPart:
    """The pictures in one parquet file, each encoded by itself (PNG or JPEG)."""

    dataset: Dataset
    path: Path
    rows: Rows
    key: str

    def pictures(self) -> Iterator[tuple[Rows, Picture]]:
        """As `VideoPart.pictures`."""
        done = 0
        with open_parquet(self.path) as parquet:
            for batch in parquet.iter_batches(batch_size=64, columns=[self.key]):
                for encoded in batch.column(0).field("bytes"):
                    row = self.rows[done : done + 1]
                    yield row, self._decode(row[0], encoded.as_py())
                    done += 1

    def _decode(self, row: int, encoded: bytes | None) -> Picture:
        try:
            with Image.open(io.BytesIO(encoded or b"")) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            found = "bytes of no kind of picture" if encoded else "no bytes"
            if not isinstance(error, UnidentifiedImageError):
                found = str(error).rstrip(".")
            raise DataError(
                f"{self.dataset.place(row)}: {self.path}: {self.key}: expected an encoded picture, "
                f"found {found}. Copy or download the file again."
            ) from error


def nearest(ascending: NDArray[np.float64], values: NDArray[np.float64]) -> Rows:
    """The place of the nearest number for each value."""
    above = np.searchsorted(ascending, values).clip(1, max(1, len(ascending) - 1))
    above = np.minimum(above, len(ascending) - 1)
    below = np.maximum(above - 1, 0)
    closer: Rows = np.where(values - ascending[below] <= ascending[above] - values, below, above)
    return closer


def parts(dataset: Dataset, key: str) -> list[VideoPart] | list[ParquetPart]:
    """The files that hold a camera's pictures; every frame of the dataset is in one of them.

    Raises:
        DataError: the dataset does not say where the pictures of an episode are.
    """
    if not dataset.is_video(key):
        return [ParquetPart(dataset, path, rows, key) for path, rows in dataset.files_and_rows()]
    lengths = np.diff(dataset.episode_starts)
    begin = dataset.episode_column(f"videos/{key}/from_timestamp")
    times = np.repeat(begin, lengths) + dataset.column("timestamp")[:, 0]
    where = np.stack(
        [dataset.episode_column(f"videos/{key}/{name}") for name in ("chunk_index", "file_index")],
        axis=1,
    ).astype(np.int64)
    files, of_episode = np.unique(where, axis=0, return_inverse=True)
    of_row = np.repeat(of_episode.reshape(-1), lengths)
    out = []
    for number, (chunk, file) in enumerate(files.tolist()):
        rows = np.flatnonzero(of_row == number)
        out.append(VideoPart(dataset, dataset.video_file(key, chunk, file), rows, times[rows]))
    return out
