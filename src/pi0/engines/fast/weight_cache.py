"""Packed weights in a file beside the checkpoint, mapped into memory at the next start.

It is a safetensors file under a name that no checkpoint has, and says in its metadata what it was
made from; if anything of that has changed, it is made anew, with a warning. The data themselves are
not checked, which would mean to read them all: a checkpoint that was changed in place, to the same
sizes and times of change, is not noticed, nor are bits that went bad on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pi0 import __version__
from pi0.checkpoint.files import CACHE_LINE, DTYPE_NAMES, TensorInfo, refuse_folder, write
from pi0.checkpoint.load import Checkpoint, Progress
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.weights import PackedWeights, Scheme, pack
from pi0.errors import EngineError, Pi0Error

MADE_FROM = "made_from"


class Stale(Exception):
    """Why a file cannot be taken."""


def load_weights(
    checkpoint: Checkpoint,
    scheme: Scheme,
    kernels: Kernels,
    image_size: int | None = None,
    progress: Progress = lambda _: None,
    keep: str | None = None,
) -> PackedWeights:
    """A checkpoint's weights, packed and in the form that the kernels want, on the CPU.

    Args:
        keep: the engine and its precision, for the name of the file in which the weights are kept
            and from which they are taken if it is there; None: they are packed and not kept.

    Raises:
        EngineError: they cannot be written.
        CheckpointError, ConfigError: see `load_model`.
    """
    if keep is None:
        return _pack(checkpoint, scheme, kernels, image_size, progress)
    size = image_size or checkpoint.config.vision.image_size
    weights = PackedWeights(checkpoint.config.with_image_size(size), scheme)
    files = list(dict.fromkeys(info.file for info in checkpoint.tensors.values()))
    path = files[0].with_name(f"{files[0].stem}.{keep}-{size}.pi0")
    made_from = _made_from(files, weights, kernels)
    refuse_folder(path)
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
    weights = pack(checkpoint, scheme, image_size, progress)
    kernels.prepare(weights)
    return weights


def _made_from(files: list[Path], weights: PackedWeights, kernels: Kernels) -> dict[str, str]:
    """Everything that the packed weights depend on, in words."""
    stats = [(file.name, file.stat()) for file in files]
    code = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*")):
        if source.suffix in (".py", ".c"):
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
    """The tensors, which are maps of the file: nothing is read before it is used.

    Raises:
        Stale: the file is damaged or was made from something else.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            found = json.loads((handle.metadata() or {}).get(MADE_FROM, "{}"))
            changed = [name for name, value in made_from.items() if found.get(name) != value]
            if changed:
                raise Stale(f"those of another {', another '.join(changed)}")
            return {name: handle.get_tensor(name) for name in handle.offset_keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise Stale(f"a damaged file ({error})") from error


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
    try:
        write(path, state.items(), headers, {MADE_FROM: json.dumps(made_from)})
    except Pi0Error as error:  # no room
        raise EngineError(f"{error} Or leave out --weight-cache.") from error


def _require_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise EngineError(
            f"{folder}: expected a folder to keep packed weights in, found one that is read-only. "
            "Copy the checkpoint to another or leave out --weight-cache."
        )
