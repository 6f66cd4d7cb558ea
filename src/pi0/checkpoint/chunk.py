"""An array that is one chunk, read from front to back, so that it never lies in memory whole.

tensorstore decodes a chunk at once, which takes its compressed and its decoded bytes: 10 GB for the
largest leaf of pi0_base. Here the place of the chunk's bytes comes from tensorstore, the bytes from
the file, and zstd decodes as many as are asked for (Python's compression.zstd, or backports.zstd
before 3.14).

Knows nothing of π0.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

SKIP_BYTES = 1 << 20
PACKAGES = ("compression.zstd", "backports.zstd")


def find_zstd() -> Any | None:
    """The module that decodes zstd step by step; None: there is none."""
    for name in PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


@dataclass(frozen=True)
class Place:
    """Where the bytes of a value lie."""

    file: Path
    offset: int
    length: int


def find_places(ts: Any, folder: Path) -> dict[str, Place]:
    """Where the values of an OCDBT database lie, by their keys, but for those inside its nodes.

    Raises:
        Exception: one of tensorstore's; KeyError, ValueError: another form of the database.
    """
    base = ts.KvStore.open({"driver": "file", "path": f"{folder.resolve()}/"}).result()
    version = ts.ocdbt.dump(base).result()["versions"][-1]
    return dict(_walk(ts, base, folder, version["root"]["location"], b""))


def _walk(
    ts: Any, base: Any, folder: Path, location: str, prefix: bytes
) -> Iterator[tuple[str, Place]]:
    """The values below a node; its keys lack the prefix that its parents hold for all of it."""
    node: Mapping[str, Any] = ts.ocdbt.dump(base, location).result()
    for entry in node["entries"]:
        if "indirect_value" in entry:
            _, store, path, offset, length = entry["indirect_value"].split(":")
            file = folder / (unquote(store) + unquote(path))
            yield (prefix + entry["key"]).decode(), Place(file, int(offset), int(length))
        elif "location" in entry:
            below = prefix + entry["subtree_common_prefix"]
            yield from _walk(ts, base, folder, entry["location"], below)


@dataclass
class ChunkReader:
    """A chunk in C order.

    Attributes:
        shape, dtype: of the array.
        zstd: the module that decodes it; None: its bytes are as they are.
        position: of the next byte, decoded.
    """

    place: Place
    shape: tuple[int, ...]
    dtype: torch.dtype
    zstd: Any | None
    position: int = 0
    stream: Any = field(default=None, repr=False)

    def read(self, index: tuple[int | slice, ...] = ()) -> Tensor:
        """A part of the array; cheap in the order in which the parts lie.

        Args:
            index: numbers on the first axes, or a slice of the first axis.

        Raises:
            ValueError: the bytes are damaged, or not as many as the array has.
            OSError: the file cannot be read.
        """
        first = index[0] if index else None
        if isinstance(first, slice):
            start = first.start or 0
            shape = (first.stop - start, *self.shape[1:])
            start *= math.prod(self.shape[1:])
        else:
            shape = self.shape[len(index) :]
            start = 0
            for axis, at in enumerate(index):
                assert isinstance(at, int)
                start += at * math.prod(self.shape[axis + 1 :])
        values = torch.empty(shape, dtype=self.dtype)
        self._seek(start * self.dtype.itemsize)
        self._fill(values.view(-1).view(torch.uint8).numpy().data)
        return values

    def close(self) -> None:
        if self.stream:
            self.stream.close()

    def _seek(self, position: int) -> None:
        if self.stream is None or position < self.position:
            self.close()
            window = _Window(self.place)
            self.stream = self.zstd.open(window) if self.zstd else window
            self.position = 0
        waste = memoryview(bytearray(min(SKIP_BYTES, position - self.position)))
        while self.position < position:
            self._fill(waste[: position - self.position])

    def _fill(self, buffer: memoryview) -> None:
        damaged = (EOFError, self.zstd.ZstdError) if self.zstd else EOFError
        while buffer:
            try:
                done = self.stream.readinto(buffer)
            except damaged as error:
                raise ValueError(f"zstd: {error}") from error
            if not done:
                raise ValueError(f"a chunk ends after {self.position} bytes")
            self.position += done
            buffer = buffer[done:]
        whole = math.prod(self.shape) * self.dtype.itemsize
        if self.position == whole and self.stream.read(1):
            raise ValueError(f"a chunk goes on after {whole} bytes")


class _Window(io.RawIOBase):
    """The bytes of a place, as a file."""

    def __init__(self, place: Place) -> None:
        self.file = open(place.file, "rb")  # noqa: SIM115 - closed by `close`
        self.file.seek(place.offset)
        self.left = place.length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: self.left]
        done = self.file.readinto(view)
        self.left -= done
        return done

    def close(self) -> None:
        self.file.close()
        super().close()
