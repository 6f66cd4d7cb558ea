"""Folders of JAX arrays as orbax writes them (OCDBT, zarr v2, zstd), with tensorstore alone.

An array is a zarr array inside an OCDBT database, under its path in the tree, joined by dots:
`params.PaliGemma.llm.layers.attn.q_einsum.w`, often with a last `.value`. Source: orbax's
`_src/serialization/` and `_src/metadata/tree.py`.

Knows nothing of π0.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pi0.checkpoint.chunk import ChunkReader, Place, find_places, find_zstd
from pi0.checkpoint.files import TORCH_DTYPES, read_json
from pi0.errors import CheckpointError, Pi0Error, install_hint

if TYPE_CHECKING:
    import tensorstore

MANIFEST = "manifest.ocdbt"
METADATA = "_METADATA"
STORES_ZEROS = "store_array_data_equal_to_fill_value"
ITEM = "params."  # the item of the checkpoint, first in every path
VALUE = ".value"  # the last level where flax's nnx wrote the tree
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # zarr's names → safetensors'
ZARR_DTYPES = {"<f4": "F32", "bfloat16": "BF16", "<f2": "F16"}  # in .zarray; little-endian
STREAMED_BYTES = 16 << 20  # larger arrays are not held in memory whole
PENDING_BYTES = 256 << 20  # written at once; the database joins what is written at once
HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
DICT_KEY = 2  # orbax's number for a level of the tree that is a dict
FULL = "RESOURCE_EXHAUSTED"  # tensorstore's word for a full disk or a quota
# What tensorstore raises: one class for each kind of status.
FAILURES = (ValueError, OSError, KeyError, NotImplementedError, RuntimeError)


def import_tensorstore(path: Path) -> Any:
    """The package.

    Raises:
        Pi0Error: it is not installed.
    """
    try:
        import tensorstore
    except ImportError as error:
        raise Pi0Error(
            f"{path}: expected the package tensorstore for a JAX checkpoint, which the extra "
            f"pi0[jax] brings, found none. {install_hint('jax')}"
        ) from error
    return tensorstore


@dataclass(frozen=True)
class ArrayInfo:
    """An array of the folder.

    Attributes:
        key: in the database.
        dtype: safetensors' name of it; zarr's, if the model cannot read it.
        layered: no chunk spans several places of the first axis.
        codec: of an array that is one chunk in C order: "zstd", or "raw"; None: it is another one.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    layered: bool = field(default=False, compare=False)
    codec: str | None = field(default=None, compare=False)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class ArrayFolder:
    """A folder of arrays, by their names: paths joined by slashes, without item and `value`."""

    folder: Path
    arrays: Mapping[str, ArrayInfo]

    @property
    def manifest(self) -> Path:
        return self.folder / MANIFEST

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[ArrayReader | ChunkReader]:
        """An array to be read in parts.

        A large one that is a single chunk is decoded from front to back. Of any other, a chunk that
        spans several parts stays in memory once it is decoded, while the array is open.
        """
        info = self.arrays[name]
        ts = import_tensorstore(self.folder)
        with _translate(self.folder, name):
            chunk = self._large_chunk(ts, info)
            if chunk:
                with contextlib.closing(chunk):
                    yield chunk
                return
            limit = 0 if info.layered else info.bytes
            context = ts.Context({"cache_pool": {"total_bytes_limit": limit}})
            spec = _array_spec(self.folder, info.key) | {"fill_missing_data_reads": self._sparse}
            yield ArrayReader(ts.open(spec, context=context, read=True).result())

    def _large_chunk(self, ts: Any, info: ArrayInfo) -> ChunkReader | None:
        """An array that is decoded step by step; None: by tensorstore, which takes more memory
        where there is no package that decodes zstd so."""
        zstd = find_zstd() if info.codec == "zstd" else None
        if info.layered or info.bytes < STREAMED_BYTES or not (zstd or info.codec == "raw"):
            return None
        place = self._places.get(f"{info.key}/{'.'.join('0' * len(info.shape))}")
        dtype = TORCH_DTYPES[info.dtype]
        return ChunkReader(place, info.shape, dtype, zstd) if place else None

    def require_data(self) -> None:
        """Raises CheckpointError if a file is missing or too short for the chunks in it."""
        try:
            places = self._places.values()
        except FAILURES:  # another form of the database: reading says what is wrong with it
            return
        ordered = sorted(places, key=lambda place: place.offset + place.length)
        for file, end in {place.file: place.offset + place.length for place in ordered}.items():
            size = file.stat().st_size if file.is_file() else -1
            if size < end:
                found = "no file" if size < 0 else size
                raise CheckpointError(
                    f"{file}: expected {end} bytes of arrays, found {found}. The JAX checkpoint is "
                    "truncated or damaged: copy or download it again."
                )

    @functools.cached_property
    def _sparse(self) -> bool:
        """Whether chunks of zeros are left out, as by older orbax; else a missing one is lost."""
        file = self.folder / METADATA
        return file.is_file() and not read_json(file).get(STORES_ZEROS)

    @functools.cached_property
    def _places(self) -> dict[str, Place]:
        return find_places(import_tensorstore(self.folder), self.folder)


@dataclass(frozen=True)
class ArrayReader:
    array: tensorstore.TensorStore

    def read(self, index: tuple[int | slice, ...] = ()) -> Tensor:
        """A part of the array, in its own dtype."""
        part = self.array[index] if index else self.array
        values = np.asarray(part.read().result())
        if values.dtype in (np.float32, np.float16):
            return torch.from_numpy(values)
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)


def open_folder(folder: Path) -> ArrayFolder:
    """Names, shapes and dtypes of the arrays; reads metadata only.

    Raises:
        CheckpointError: no such database, or a damaged one.
        Pi0Error: tensorstore is not installed.
    """
    ts = import_tensorstore(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(
            f"{folder}: expected a JAX checkpoint with {MANIFEST}, found none. Copy the whole "
            "folder; one of an orbax that wrote no OCDBT has to be saved again with a newer one."
        )
    arrays: dict[str, ArrayInfo] = {}
    with _translate(folder, MANIFEST):
        store = ts.KvStore.open(_database_spec(folder)).result()
        keys = [key.decode() for key in store.list().result()]
        paths = sorted(key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray"))
        opened = {path: ts.open(_array_spec(folder, path), read=True) for path in paths}
        for path, future in opened.items():
            array = future.result()
            dtype = DTYPES.get(array.dtype.name, array.dtype.name)
            name = path.removeprefix(ITEM).removesuffix(VALUE).replace(".", "/")
            layered = tuple(array.chunk_layout.read_chunk.shape or ())[:1] == (1,)
            codec = _codec_of_one_chunk(array.spec().to_json()["metadata"])
            if name in arrays:
                raise CheckpointError(
                    f"{folder}: {name}: expected one array, found {arrays[name].key} and {path}. "
                    "Copy or download the folder of one checkpoint."
                )
            arrays[name] = ArrayInfo(path, tuple(array.shape), dtype, layered, codec)
    if not arrays and any(key.endswith("zarr.json") for key in keys):
        raise CheckpointError(
            f"{manifest}: expected arrays of zarr v2, as openpi saves them, found zarr v3. Save "
            "them again with use_zarr3=False."
        )
    if not arrays:
        raise CheckpointError(
            f"{manifest}: expected arrays, found none. The folder is incomplete: copy or download "
            "it again."
        )
    found = ArrayFolder(folder, arrays)
    found.require_data()
    return found


def _codec_of_one_chunk(metadata: Mapping[str, Any]) -> str | None:
    """How the bytes of an array are packed that is a single chunk, as they lie in memory."""
    plain = metadata["order"] == "C" and not metadata["filters"]
    if not plain or metadata["chunks"] != metadata["shape"] or metadata["dtype"] not in ZARR_DTYPES:
        return None
    compressor = metadata["compressor"]
    return "zstd" if compressor and compressor["id"] == "zstd" else None if compressor else "raw"


@dataclass(frozen=True)
class ArraySpec:
    """An array to be written: shape, shape of its chunks, safetensors' name of its dtype."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str


def write_folder(
    folder: Path,
    arrays: Mapping[str, ArraySpec],
    parts: Iterable[tuple[str, tuple[int | slice, ...], Tensor]],
) -> None:
    """Writes a folder of arrays that orbax restores, without a last level `value`.

    Args:
        folder: made here.
        arrays: by paths joined by slashes.
        parts: (name, where it lies in the array, values) until all arrays are filled.

    Raises:
        Pi0Error: the folder cannot be written, or tensorstore is not installed.
    """
    ts = import_tensorstore(folder)
    folder.mkdir(parents=True)
    begun = time.time_ns()
    keys = {name: ITEM + name.replace("/", ".") for name in arrays}
    context = ts.Context()  # its cache keeps nothing that is written
    stores = {}
    for name, array in arrays.items():
        spec = _array_spec(folder, keys[name]) | {
            "metadata": _zarr_metadata(array),
            "store_data_equal_to_fill_value": True,
        }
        with _translate_writing(folder):
            stores[name] = ts.open(spec, context=context, create=True).result()
    pending: list[Any] = []
    try:
        _write_parts(folder, stores, parts, pending)
    finally:  # else a write could still make files where the folder is being removed
        for written in pending:
            written.exception()
    _write_metadata(folder, arrays, keys, begun)


def _write_parts(
    folder: Path,
    stores: Mapping[str, Any],
    parts: Iterable[tuple[str, tuple[int | slice, ...], Tensor]],
    pending: list[Any],
) -> None:
    size = 0
    for name, index, values in parts:
        with _translate_writing(folder):
            written = stores[name][index].write(_to_numpy(values, stores[name].dtype))
            written.copy.result()  # the values may be gone after this
            pending.append(written)
            size += values.nbytes
            if size >= PENDING_BYTES:
                _wait(pending)
                size = 0
    with _translate_writing(folder):
        _wait(pending)


def _wait(pending: list[Any]) -> None:
    for written in pending:
        written.result()
    pending.clear()


def _to_numpy(values: Tensor, dtype: Any) -> Any:
    if values.dtype == torch.bfloat16:
        return values.contiguous().view(torch.int16).numpy().view(dtype.numpy_dtype)
    return values.numpy()


def _zarr_metadata(array: ArraySpec) -> dict[str, Any]:
    return {
        "chunks": list(array.chunks),
        "compressor": {"id": "zstd", "level": 1},
        "dimension_separator": ".",
        "dtype": next(zarr for zarr, name in ZARR_DTYPES.items() if name == array.dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(array.shape),
        "zarr_format": 2,
    }


def _write_metadata(
    folder: Path, arrays: Mapping[str, ArraySpec], keys: Mapping[str, str], begun: int
) -> None:
    """The files from which orbax knows the tree and how it was written."""
    tree = {}
    for name, array in arrays.items():
        levels = (ITEM.removesuffix("."), *name.split("/"))
        tree[str(levels)] = {
            "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in levels],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(array.shape),
            },
        }
    written = [
        {
            "param_name": keys[name],
            "write_shape": list(array.shape),
            "chunk_shape": list(array.chunks),
            "ext_metadata": None,
        }
        for name, array in arrays.items()
    ]
    files = {
        METADATA: {
            "tree_metadata": tree,
            "use_zarr3": False,
            STORES_ZEROS: True,
            "custom_metadata": None,
        },
        "array_metadatas/process_0": {
            "array_metadatas": [{"array_metadata": entry} for entry in written]
        },
        "_CHECKPOINT_METADATA": {
            "item_handlers": HANDLER,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": begun,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {},
        },
    }
    for file, content in files.items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


@contextlib.contextmanager
def _translate_writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        reason = " ".join(str(error).split())
        if FULL in reason:  # said by who asked for the folder, with its name
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise Pi0Error(
            f"{folder}: expected a place where JAX arrays can be written, found: {reason[:300]}. "
            "Make room, or name another place."
        ) from error


def _database_spec(folder: Path) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    return {"driver": "ocdbt", "base": base}


def _array_spec(folder: Path, key: str) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {**_database_spec(folder), "path": f"{key}/"}}


@contextlib.contextmanager
def _translate(folder: Path, name: str) -> Iterator[None]:
    """Turns what tensorstore raises into one sentence."""
    try:
        yield
    except FAILURES as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: {name}: expected a complete JAX checkpoint, found a truncated or damaged "
            f"one ({reason[:300]}). Copy or download it again."
        ) from error
