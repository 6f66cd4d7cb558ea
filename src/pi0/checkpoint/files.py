"""Safetensors files: which ones make up a checkpoint, what they hold, and streaming in and out.

Reading goes through the memory map in slabs and gives the pages back as it goes, so that loading
needs little memory beyond the parameters themselves. Writing streams too, to a temporary name that
takes its place only when complete.

Knows nothing of π0.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pi0.errors import CheckpointError, Pi0Error

SLAB_BYTES = 64 << 20
CACHE_LINE = 64  # bytes of a processor's cache line, where vectors are read fastest
# Of safetensors' dtypes; the model reads only those in TORCH_DTYPES.
BITS = {"F64": 64, "I64": 64, "U64": 64, "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8,
        "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}  # fmt: skip
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
WRITTEN = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32,
           "F8_E4M3": torch.float8_e4m3fn}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in (TORCH_DTYPES | WRITTEN).items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; `dtype` is safetensors' name for it (BF16, F32, ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.parameters * BITS.get(self.dtype, 32) // 8


def find_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: a file, a folder, or a shard index.

    In a folder: model.safetensors; else the shards of model.safetensors.index.json; else every
    other *.safetensors but the statistics of a LeRobot processor.

    Raises:
        CheckpointError: nothing there, or a shard is missing.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path}: expected a checkpoint folder or a .safetensors file, found nothing there."
        )
    if path.is_file():
        return _shards(path) if path.name.endswith(".index.json") else [path]
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if (index := path / "model.safetensors.index.json").exists():
        return _shards(index)
    files = sorted(f for f in path.glob("*.safetensors") if not f.name.startswith("policy_"))
    if not files:
        hint = (
            " A folder `params` is a JAX checkpoint: convert it to PyTorch with openpi first."
            if (path / "params").is_dir()
            else ""
        )
        raise CheckpointError(
            f"{path}: expected model.safetensors, a shard index or another .safetensors file, "
            f"found none.{hint}"
        )
    return files


def read_headers(files: list[Path]) -> dict[str, TensorInfo]:
    """Name, shape and dtype of every tensor; reads headers only.

    Raises:
        CheckpointError: a file is truncated or no safetensors file, or two files hold a tensor of
            the same name.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no dict
                if name in tensors:
                    raise CheckpointError(
                        f"{name}: expected in one file, found in {tensors[name].file.name} and "
                        f"{file.name}. Name the file to be read, or write a shard index."
                    )
                part = handle.get_slice(name)
                tensors[name] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype())
    return tensors


def stream(tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, slice, Tensor]]:
    """Yields (name, rows, values) of each tensor in slabs of rows, in the order of the files.

    The values are a view of the file: copy them before asking for the next slab.
    """
    for file in dict.fromkeys(info.file for info in tensors.values()):
        with _open(file) as handle:
            names = [name for name in handle.offset_keys() if name in tensors]
        slabs = [(name, rows) for name in names for rows in _slabs(tensors[name])]
        while slabs:
            # Opened anew for every 64 MiB: closing gives the pages of the map back, which would
            # otherwise count as resident until the whole file is read.
            with _open(file) as handle:
                done = 0
                while slabs and done < SLAB_BYTES:
                    name, rows = slabs.pop(0)
                    values = handle.get_slice(name)[rows]
                    yield name, rows, values
                    done += values.nbytes


def write(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    headers: dict[str, TensorInfo],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file from a stream of tensors, in the order of `headers`.

    Format: 8 bytes little-endian length, a JSON header of that length, the data, which begin at a
    cache line's start.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, info in headers.items():
        end = offset + info.bytes
        entries[name] = {
            "dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % CACHE_LINE)
    with replacing(path) as temporary, open(temporary, "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in tensors:
            if tuple(tensor.shape) != headers[name].shape:
                raise ValueError(f"{name}: header says {headers[name].shape}")
            out.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        if out.tell() != 8 + len(header) + offset:
            raise ValueError("tensors do not fill the file that the header describes")
        # Else the file could have its name, but not its data, when the power fails.
        out.flush()
        os.fsync(out.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place if the block succeeds.

    Raises:
        Pi0Error: the path is a folder.
    """
    require_file_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require_file_name(*paths: Path | None) -> None:
    """Raises Pi0Error if something to be written is a folder: before the work, not after it."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.name):
            raise Pi0Error(f"{path}: expected the name of a file to write, found a folder.")


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file does not hold one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected JSON, found {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(value).__name__}.")
    return value


def get_nested(value: Any, path: str) -> Any:
    """The value at "a.b.c" inside nested JSON objects; None where there is no such place."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: expected an object `weight_map`, found none.")
    files = sorted({index.parent / str(name) for name in weight_map.values()})
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: expected {len(files)} shards as {index.name} says, found no "
            f"{', '.join(missing)}."
        )
    return files


def _slabs(info: TensorInfo) -> Iterator[slice]:
    if not info.shape:
        yield slice(None)
        return
    row = max(1, info.bytes // max(1, info.shape[0]))
    rows = max(1, SLAB_BYTES // row)
    for start in range(0, info.shape[0], rows):
        yield slice(start, min(start + rows, info.shape[0]))


@contextlib.contextmanager
def _open(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: expected a complete safetensors file of {file.stat().st_size} bytes, found a "
            f"truncated or damaged one ({error}). Copy or download it again."
        ) from error
