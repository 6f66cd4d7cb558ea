"""Videos of one camera: AV1 in MP4 out, anything that FFmpeg knows in.

The encoder's settings are LeRobot 0.6.1's (`configs/video.py`): constant quality, a key frame at
every second frame, so that any frame is at most one away from a key frame. One thread, so that the
same frames give the same file whatever else the machine does.

Knows nothing of datasets.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

from pi0.checkpoint.outputs import replacing
from pi0.data.schema import Picture
from pi0.errors import DataError

ENCODER = "libsvtav1"
PIXELS = "yuv420p"
# What becomes of metadata that is no UTF-8; from PyAV 19 on that is not asked.
DAMAGED_TEXT: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
)
SETTINGS: dict[str, Any] = {"g": 2, "crf": 30, "preset": 12, "fast_decode": 0}
OPTIONS = {
    "g": str(SETTINGS["g"]),
    "crf": str(SETTINGS["crf"]),
    "preset": str(SETTINGS["preset"]),
    "svtav1-params": f"fast-decode={SETTINGS['fast_decode']}:lp=1",
}


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself.

    Attributes:
        times: [n] float64, when each frame is shown, in s, ascending.
    """

    height: int
    width: int
    codec: str
    pixels: str
    times: NDArray[np.float64]


def write_video(path: Path, pictures: Iterable[Picture], fps: int, size: tuple[int, int]) -> None:
    """Encodes pictures [H, W, 3] of one size (height, width); the file appears when complete.

    Raises:
        DataError: the codec refuses them.
        Pi0Error: the file cannot be written.
    """
    os.environ.setdefault("SVT_LOG", "1")  # errors only: the encoder would print its settings
    with replacing(path) as temporary:
        try:
            _encode(temporary, pictures, fps, size)
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise DataError(
                f"{path}: expected pictures that AV1 can encode, found: {error.strerror or error}."
            ) from error
        sync(temporary)


def _encode(path: Path, pictures: Iterable[Picture], fps: int, size: tuple[int, int]) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = cast(VideoStream, container.add_stream(ENCODER, fps, OPTIONS))
        stream.height, stream.width = size
        stream.pix_fmt = PIXELS
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
            if number == 0:
                _leave_real_time()  # the first picture opens the encoder
        container.mux(stream.encode())


def _leave_real_time() -> None:
    """Takes back the real-time priority that SVT-AV1 gives every thread of the process where it
    may, as root: everything else on the machine would wait."""
    tasks = Path("/proc/self/task")
    for thread in map(int, os.listdir(tasks) if tasks.is_dir() else []):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.sched_getscheduler(thread) == os.SCHED_FIFO:
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def sync(path: Path) -> None:
    """Else a file could have its name, but not its data, when the power fails."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def inspect_video(path: Path) -> VideoInfo:
    """Reads the index of a video, decoding nothing.

    Raises:
        DataError: there is no such file, or it holds no video.
    """
    with _open(path) as (container, stream):
        base = stream.time_base or Fraction(1)
        times = [
            float(packet.pts * base)
            for packet in container.demux(stream)
            if packet.pts is not None and not packet.is_discard
        ]
        return VideoInfo(
            stream.height,
            stream.width,
            stream.codec.canonical_name,
            stream.pix_fmt or "",
            np.sort(np.asarray(times, np.float64)),
        )


def decode_video(path: Path) -> Iterator[tuple[float, Picture]]:
    """Yields (time in s, picture) of each frame, in the order in which they are shown.

    Raises:
        DataError: there is no such file, or a frame cannot be decoded.
    """
    with _open(path) as (container, stream):
        base = stream.time_base or Fraction(1)
        for frame in container.decode(stream):
            if frame.pts is not None:
                picture: Picture = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
                yield float(frame.pts * base), picture


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, VideoStream]]:
    if not path.is_file():
        raise DataError(f"{path}: expected a video, found no file. Copy or download it.")
    try:
        with av.open(str(path), **DAMAGED_TEXT) as container:
            if not container.streams.video:
                raise DataError(f"{path}: expected a video, found a file without one.")
            stream = container.streams.video[0]
            if getattr(stream, "codec_context", None) is None:
                raise DataError(
                    f"{path}: expected a video of a codec that FFmpeg knows, found none."
                )
            yield container, stream
    except av.error.FFmpegError as error:
        raise DataError(
            f"{path}: expected a video that can be decoded, found: {error.strerror or error}."
        ) from error
