"""Decoded pictures of a camera, once for all, in a file that training maps into memory.

The file is a NumPy array [N, H, W, 3] of bytes under the dataset's .cache/pi0 or a folder that the
caller names. Its name holds a hash of the videos' sizes and times of change and of all that decides
what is in it, so that an outdated one is never read; it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pi0.checkpoint.outputs import replacing, require_writable
from pi0.data.pictures import ParquetPart, Rows, VideoPart, parts
from pi0.data.schema import Picture
from pi0.errors import DataError
from pi0.policy.images import RESIZE

if TYPE_CHECKING:
    from pi0.data.read import Dataset

FOLDER = ".cache/pi0"  # in the dataset's folder


class FrameStore:
    """All pictures of a camera: `store[i]` and `store[array of i]` give uint8 [..., H, W, 3].

    Read from disk when asked for. A copy in another process opens the file again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._frames: NDArray[np.uint8] = np.load(path, mmap_mode="r")

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, H, W, 3]."""
        return self._frames.shape

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        return np.array(self._frames[index])

    def __reduce__(self) -> tuple[Any, ...]:
        return FrameStore, (self.path,)


def open_frames(
    dataset: Dataset,
    key: str,
    size: int | None,
    resize: str,
    cache: Path | None,
    progress: Callable[[int], None],
) -> FrameStore:
    """See `Dataset.frames`."""
    if key not in dataset.cameras:
        raise DataError(
            f"camera {key}: expected one of {', '.join(dataset.cameras) or 'none'}, which "
            f"{dataset.root} has, found another name."
        )
    if resize not in RESIZE:
        raise DataError(f"resize: expected {' or '.join(RESIZE)}, found {resize!r}.")
    if not dataset.num_frames:
        raise DataError(f"{dataset.root}: expected frames, found none.")
    shape = (dataset.num_frames, *(dataset.picture_size(key) if size is None else (size, size)), 3)
    sources = parts(dataset, key)
    name = f"{key}-{size or 'native'}-{_digest(sources, key, shape, resize if size else '')}.npy"
    path = (cache or dataset.root / FOLDER) / name
    if not path.is_file():
        need = int(np.prod(shape)) + 128
        require_writable(path, size=need)
        with replacing(path, need) as temporary:
            _write(temporary, _resized(sources, key, shape, size, resize), shape, progress)
    return FrameStore(path)


def _digest(
    sources: list[VideoPart] | list[ParquetPart], key: str, shape: tuple[int, ...], resize: str
) -> str:
    out = hashlib.sha256(repr((key, shape, resize)).encode())
    for part in sources:
        if not part.path.is_file():
            continue  # said when it is read
        stat = part.path.stat()
        place = os.path.relpath(part.path, part.dataset.root)
        out.update(repr((place, stat.st_size, stat.st_mtime_ns)).encode())
        out.update(part.rows.tobytes())
        if isinstance(part, VideoPart):
            out.update(part.times.tobytes())
    return out.hexdigest()[:16]


def _resized(
    sources: list[VideoPart] | list[ParquetPart],
    key: str,
    shape: tuple[int, ...],
    size: int | None,
    resize: str,
) -> Iterator[tuple[Rows, Picture]]:
    for part in sources:
        for rows, picture in part.pictures():
            if size is not None and picture.shape != shape[1:]:
                pixels = RESIZE[resize](picture, size) * 255
                picture = pixels.round().clamp(0, 255).byte().numpy()
            if picture.shape != shape[1:]:
                raise DataError(
                    f"{part.dataset.place(rows[0])}: {key}: expected a picture "
                    f"{list(shape[1:])}, found {list(picture.shape)}. Name a size for all."
                )
            yield rows, picture


def _write(
    path: Path,
    pictures: Iterator[tuple[Rows, Picture]],
    shape: tuple[int, ...],
    progress: Callable[[int], None],
) -> None:
    """Through the file, not a memory map: a full disk is an error then, and no signal."""
    done = np.zeros(shape[0], bool)
    each = int(np.prod(shape[1:]))
    with open(path, "wb") as handle:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, header)
        start = handle.tell()
        for rows, picture in pictures:
            data = np.ascontiguousarray(picture).tobytes()
            for row in rows.tolist():
                handle.seek(start + row * each)
                handle.write(data)
            done[rows] = True
            progress(len(rows))
    if not done.all():
        raise DataError(f"{path}: expected {shape[0]} pictures, found {int(done.sum())}.")
