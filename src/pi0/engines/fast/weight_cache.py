"""Packed weights in a file beside the checkpoint, mapped into memory at the next start.

It is a safetensors file under a name that no checkpoint has. Its metadata say what it was made
from, and hold checksums of its data; if anything of that differs, it is made anew, with a warning.
A checkpoint that was changed in place, to the same sizes and times of change, is not noticed.

Checksums are CRC-32, computed by several threads, each through a buffer that stays in a processor's
cache, so that checking keeps no page of the file resident.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pi0 import __version__
from pi0.checkpoint.files import CACHE_LINE, DTYPE_NAMES, TensorInfo, write
from pi0.checkpoint.load import Checkpoint, Progress, check
from pi0.checkpoint.locate import SHIPPED
from pi0.checkpoint.outputs import refuse_folder
from pi0.engines.fast.equalise import find_equalisers
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.weights import PackedWeights, Scheme, pack
from pi0.errors import EngineError, Pi0Error

MADE_FROM, CHECKSUMS = "made_from", "checksums"  # in the metadata, as JSON
PIECE_BYTES = 64 << 20  # of a tensor, that have a checksum
BUFFER_BYTES = 1 << 20


class Stale(Exception):
    """Why a file cannot be taken."""


def load_weights(
    checkpoint: Checkpoint,
    scheme: Scheme,
    kernels: Kernels,
    image_size: int | None = None,
    progress: Progress = lambda _: None,
    cache_name: str | None = None,
) -> PackedWeights:
    """A checkpoint's weights, packed and in the form that the kernels want, on the CPU.

    Args:
        cache_name: the engine and its precision, for the name of the file in which the weights are
            kept and from which they are taken if it is there; None: they are packed and not kept.

    Raises:
        EngineError: they cannot be written, or would be into this package.
        CheckpointError, ConfigError: see `load_model`.
    """
    if cache_name is None:
        return _pack(checkpoint, scheme, kernels, image_size, progress)
    size = checkpoint.config.vision.image_size if image_size is None else image_size
    weights = PackedWeights(checkpoint.config.with_image_size(size), scheme)
    files = checkpoint.files
    path = files[0].with_name(f"{files[0].stem}.{cache_name}-{size}.pi0")
    made_from = _made_from(files, weights, kernels)
    refuse_folder(path)
    if SHIPPED in path.parents:
        raise EngineError(
            f"{path.parent}: expected a folder of yours to keep packed weights in, found the "
            "package's own. Copy the checkpoint to another or leave out --weight-cache."
        )
    if path.exists():
        try:
            weights.restore(_read(path, made_from))
        except Stale as why:
            message = (
                f"{path}: expected the packed weights of this start, found {why}. Packing anew."
            )
            warnings.warn(message, stacklevel=2)
        else:
            progress(checkpoint.read_bytes)
            return weights
    _require_writable(path.parent)
    weights = _pack(checkpoint, scheme, kernels, image_size, progress)
    _write(path, weights.state(), made_from)
    return weights


def _pack(
    checkpoint: Checkpoint,
    scheme: Scheme,
    kernels: Kernels,
    image_size: int | None,
    progress: Progress,
) -> PackedWeights:
    check(checkpoint)
    scales = {norm: found.scale for norm, found in find_equalisers(checkpoint, scheme).items()}
    return pack(checkpoint, scheme, image_size, progress, scales, kernels.lay_out)


def _made_from(files: list[Path], weights: PackedWeights, kernels: Kernels) -> dict[str, str]:
    """Everything that the packed weights depend on, in words."""
    stats = [(file.name, file.stat()) for file in files]
    code = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*")):
        if source.suffix in (".py", ".c", ".h"):
            code.update(source.read_bytes())
    return {
        "checkpoint": str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]),
        "configuration": str(weights.config),
        "scheme": str(weights.scheme),
        "kernels": type(kernels).__name__,
        "version": __version__,
        "engine code": code.hexdigest(),
    }


def _read(path: Path, made_from: dict[str, str]) -> dict[str, Tensor]:
    """The tensors, which are maps of the file, after its data have been checked.

    Raises:
        Stale: the file is damaged or was made from something else.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            found = json.loads(metadata.get(MADE_FROM, "{}"))
            found = found if isinstance(found, dict) else {}
            changed = [name for name, value in made_from.items() if found.get(name) != value]
            if changed:
                raise Stale(f"those of another {', another '.join(changed)}")
            checksums = _flat(json.loads(metadata.get(CHECKSUMS, "{}")))
            tensors = {name: handle.get_tensor(name) for name in handle.offset_keys()}
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise Stale(f"a damaged file ({error})") from error
    pieces = _pieces(tensors)
    lost = sorted(checksums.keys() - {(piece.tensor, str(piece.start)) for piece in pieces})
    if lost:
        raise Stale(f"a damaged tensor {lost[0][0]}")
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for piece, checksum in zip(
            pieces, pool.map(partial(_file_checksum, path), pieces), strict=True
        ):
            if checksums.get((piece.tensor, str(piece.start))) != checksum:
                pool.shutdown(cancel_futures=True)
                raise Stale(f"a damaged tensor {piece.tensor}")
    return tensors


def _flat(checksums: Any) -> dict[tuple[str, str], Any]:
    """Checksums as they are in the file by tensor and first byte; ValueError for anything else."""
    if not isinstance(checksums, dict) or not all(isinstance(v, dict) for v in checksums.values()):
        raise ValueError("no table of checksums")
    return {(name, start): c for name, table in checksums.items() for start, c in table.items()}


class Piece(NamedTuple):
    """Some bytes of a tensor: from `start` on in it, from `offset` on in the file's data."""

    tensor: str
    start: int
    offset: int
    size: int
    description: bytes  # of the tensor; the checksum covers it, too


def _pieces(tensors: dict[str, Tensor]) -> list[Piece]:
    """All pieces of tensors that lie one after the other."""
    pieces, offset = [], 0
    for name, tensor in tensors.items():
        description = f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
        for start in range(0, tensor.nbytes, PIECE_BYTES):
            size = min(PIECE_BYTES, tensor.nbytes - start)
            pieces.append(Piece(name, start, offset + start, size, description))
        offset += tensor.nbytes
    return pieces


def _file_checksum(path: Path, piece: Piece) -> int:
    """The checksum of a piece as it is in the file."""
    checksum, left = zlib.crc32(piece.description), piece.size
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with open(path, "rb", buffering=0) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        file.seek(8 + header_bytes + piece.offset)
        while left and (read := file.readinto(buffer[:left])):
            checksum = zlib.crc32(buffer[:read], checksum)
            left -= read
    return checksum


def _checksums(tensors: dict[str, Tensor]) -> dict[str, dict[int, int]]:
    """The checksum of every piece, by tensor and first byte in it."""
    checksums: dict[str, dict[int, int]] = {}

    def compute(piece: Piece) -> int:
        data = tensors[piece.tensor].contiguous().view(-1).view(torch.uint8).numpy()
        part = data[piece.start : piece.start + piece.size]
        return zlib.crc32(part.data, zlib.crc32(piece.description))

    pieces = _pieces(tensors)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for piece, checksum in zip(pieces, pool.map(compute, pieces), strict=True):
            checksums.setdefault(piece.tensor, {})[piece.start] = checksum
    return checksums


def _write(path: Path, state: dict[str, Tensor], made_from: dict[str, str]) -> None:
    # Those that fill whole cache lines first, then by the size of their elements: so each starts
    # where a vector is read fastest, though nothing lies between them.
    state = dict(
        sorted(
            state.items(), key=lambda item: (item[1].nbytes % CACHE_LINE != 0, -item[1].itemsize)
        )
    )
    headers = {
        name: TensorInfo(path, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])
        for name, tensor in state.items()
    }
    metadata = {MADE_FROM: json.dumps(made_from), CHECKSUMS: json.dumps(_checksums(state))}
    try:
        write(path, state.items(), headers, metadata)
    except Pi0Error as error:  # no room
        raise EngineError(f"{error} Or leave out --weight-cache.") from error


def _require_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise EngineError(
            f"{folder}: expected a folder to keep packed weights in, found one that is read-only. "
            "Copy the checkpoint to another or leave out --weight-cache."
        )
