"""Safetensors and JSON files: what they hold, and streaming in and out.

Reading goes through the memory map in slabs and gives the pages back as it goes, so that loading
needs little memory beyond the parameters themselves; every slab is checked for NaN and infinities.
Writing streams too, to a temporary name that takes its place only when complete.

Knows nothing of π0, nor which files make up a checkpoint (`locate.py`).
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

from pi0.checkpoint.damage import describe_json, describe_safetensors
from pi0.checkpoint.outputs import replacing
from pi0.errors import CheckpointError, kind_of

SLAB_BYTES = 64 << 20
CACHE_LINE = 64  # bytes of a processor's cache line, where vectors are read fastest
# Of safetensors' dtypes; the model reads only those in TORCH_DTYPES.
BITS = {"F64": 64, "I64": 64, "U64": 64, "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8,
        "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}  # fmt: skip
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
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


def read_headers(
    files: list[Path], shards: Mapping[str, Path] | None = None
) -> dict[str, TensorInfo]:
    """Name, shape and dtype of every tensor; reads headers only.

    Args:
        shards: tensor → file, as a shard index lists them; None: there is no index.

    Raises:
        CheckpointError: a file is truncated or no safetensors file, two files hold a tensor of the
            same name, or the files do not hold what the index lists.
    """
    tensors: dict[str, TensorInfo] = {}
    unlisted = []
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no dict
                if shards is not None and shards.get(name) != file:
                    unlisted += [] if name in shards else [name]
                    continue
                if name in tensors:
                    raise CheckpointError(
                        f"{name}: expected in one file, found in {tensors[name].file.name} and "
                        f"{file.name}. Name the file to be read, or write a shard index."
                    )
                part = handle.get_slice(name)
                tensors[name] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype())
    lost = [f"{name} ({file.name})" for name, file in (shards or {}).items() if name not in tensors]
    for names, fault in ((lost, "that are not in the shard it names"), (unlisted, "not listed")):
        if names:
            raise CheckpointError(
                f"{files[0].parent}: expected shards with exactly the tensors that their index "
                f"lists, found {len(names)} {fault}, such as {names[0]}. Copy or download index "
                "and shards of the same checkpoint."
            )
    return tensors


def stream(
    tensors: Mapping[str, TensorInfo], check_finite: bool = True
) -> Iterator[tuple[str, slice, Tensor]]:
    """Yields (name, rows, values) of each tensor in slabs of rows, in the order of the files.

    The values are a view of the file: copy them before asking for the next slab.

    Raises:
        CheckpointError: a tensor holds NaN or infinite values, unless `check_finite` is False.
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
                    if check_finite and values.is_floating_point() and values.numel():
                        require_finite(file, name, values)
                    yield name, rows, values
                    done += values.nbytes


def write(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    headers: dict[str, TensorInfo],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file from a stream of whole tensors; see `write_slabs`."""
    slabs = ((name, slice(0, None), tensor) for name, tensor in tensors)
    write_slabs(path, slabs, headers, metadata)


def write_slabs(
    path: Path,
    slabs: Iterable[tuple[str, slice, Tensor]],
    headers: dict[str, TensorInfo],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file from (name, rows, values), in any order, each row once.

    Format: 8 bytes little-endian length, a JSON header of that length, the data in the order of
    `headers`, which begin at a cache line's start.
    """
    starts: dict[str, int] = {}
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, info in headers.items():
        starts[name], end = offset, offset + info.bytes
        entries[name] = {
            "dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % CACHE_LINE)
    total = 8 + len(header) + offset
    with replacing(path, total) as temporary, open(temporary, "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        written = len(header) + 8
        for name, rows, values in slabs:
            info, start = headers[name], rows.start or 0
            if DTYPE_NAMES[values.dtype] != info.dtype or values.shape[1:] != info.shape[1:]:
                raise ValueError(f"{name}: header says {info.dtype} {info.shape}")
            row = info.bytes // info.shape[0] if info.shape and info.shape[0] else 0
            out.seek(8 + len(header) + starts[name] + start * row)
            written += out.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)
        if written != total:
            raise ValueError("tensors do not fill the file that the header describes")
        # Else the file could have its name, but not its data, when the power fails.
        out.flush()
        os.fsync(out.fileno())


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file in UTF-8, with or without a byte order mark.

    Raises:
        CheckpointError: the file cannot be read, or does not hold one.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a JSON file, found: {error.strerror or error}."
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: expected JSON, found lists nested too deeply.") from error
    except ValueError as error:  # no JSON, no UTF-8, a key twice, a number of thousands of digits
        found = describe_json(path, error)
        raise CheckpointError(f"{path}: expected JSON, found {found}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {kind_of(value)}.")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object; ValueError where a key has two values, of which one would silently win."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} twice in one object")
    return value


def get_nested(value: Any, path: str) -> Any:
    """The value at "a.b.c" inside nested JSON objects; None where there is no such place."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _slabs(info: TensorInfo) -> Iterator[slice]:
    if not info.shape:
        yield slice(None)
        return
    row = max(1, info.bytes // max(1, info.shape[0]))
    rows = max(1, SLAB_BYTES // row)
    for start in range(0, info.shape[0], rows):
        yield slice(start, min(start + rows, info.shape[0]))


def require_finite(file: Path, name: str, values: Tensor) -> None:
    """Raises CheckpointError if a tensor of a file holds NaN or infinities."""
    # Both are NaN if any value is; so two numbers tell, in one pass without a copy.
    least, greatest = values.aminmax()
    if math.isfinite(least) and math.isfinite(greatest):
        return
    count = int((~torch.isfinite(values)).sum())
    raise CheckpointError(
        f"{file}: {name}: expected finite weights, found {count} NaN or infinite in "
        f"{values.numel()} values. The file is damaged: copy or download it again."
    )


@contextlib.contextmanager
def _open(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise CheckpointError(f"{file}: {describe_safetensors(file, error)}") from error
    except OSError as error:
        raise CheckpointError(
            f"{file}: expected a safetensors file that can be read, found: "
            f"{error.strerror or error}."
        ) from error
