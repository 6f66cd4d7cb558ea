"""A checkpoint written in another project's form: its weights, and files beside them.

Weights stream from the source to the target, slab by slab. All files are written into a temporary
folder that takes its place when the last one is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pi0.checkpoint.files import DTYPE_NAMES, SLAB_BYTES, TORCH_DTYPES, TensorInfo, write_slabs
from pi0.checkpoint.jax import write_params
from pi0.checkpoint.layouts import LEROBOT, OPENPI, Layout, their_names
from pi0.checkpoint.load import Checkpoint, check
from pi0.checkpoint.locate import PARAMS, WEIGHTS
from pi0.checkpoint.orbax import import_tensorstore
from pi0.checkpoint.outputs import new_folder
from pi0.checkpoint.synth import UNREAD, tensor_list
from pi0.errors import ConfigError

# Target → whose names its safetensors file has; None: JAX parameters.
TARGETS: dict[str, Layout | None] = {"openpi": OPENPI, "lerobot": LEROBOT, "jax": None}

Progress = Callable[[int], None]  # called with the bytes read since the last call


def parse_target(target: str) -> Layout | None:
    """The layout of a target; None: JAX parameters.

    Raises:
        ConfigError: there is no such target.
    """
    if target not in TARGETS:
        raise ConfigError(f"--to: expected one of {', '.join(TARGETS)}, found {target!r}.")
    return TARGETS[target]


def convert(
    checkpoint: Checkpoint,
    out: Path,
    target: str,
    files: Mapping[str, Path | bytes],
    dtype: torch.dtype | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """Writes a folder with the weights of a checkpoint, LoRA merged, and other files.

    Args:
        out: a folder that is new or empty.
        target: one of `TARGETS`.
        files: contents, or files to copy, by their path in the folder.
        dtype: of all weights, float32 or bfloat16; None: each as `Checkpoint.stream` yields it.

    Raises:
        CheckpointError: the checkpoint does not fit in every tensor, or holds NaN or infinities.
        ConfigError: no such target.
        Pi0Error: the folder cannot be written, or has too little room.
    """
    layout = parse_target(target)
    check(checkpoint)
    dtypes = {ours: dtype or stored for ours, stored in checkpoint.dtypes.items()}
    headers = _headers(checkpoint, layout or OPENPI, dtypes)
    if layout is None:
        import_tensorstore(out)  # before the work
    with new_folder(out, sum(info.bytes for info in headers.values())) as folder:
        values = _values(checkpoint, progress)
        if layout is None:
            write_params(folder / PARAMS, checkpoint.config, dtypes, values)
        else:
            slabs = _slabs(checkpoint, layout, dtypes, headers, values)
            write_slabs(folder / WEIGHTS, slabs, headers)
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)


def _headers(
    checkpoint: Checkpoint, layout: Layout, dtypes: Mapping[str, torch.dtype]
) -> dict[str, TensorInfo]:
    """The tensors of the target's file. A head that is never read is there all the same, since
    openpi and LeRobot load strictly."""
    least = dtypes[next(iter(dtypes))]
    return {
        theirs: TensorInfo(Path(WEIGHTS), shape, DTYPE_NAMES[dtypes.get(ours, least)])
        for theirs, (ours, shape) in tensor_list(checkpoint.config, layout).items()
    }


def _values(checkpoint: Checkpoint, progress: Progress) -> Iterator[tuple[str, slice, Tensor]]:
    for ours, rows, values in checkpoint.stream():
        yield ours, rows, values
        progress(values.nbytes)


def _slabs(
    checkpoint: Checkpoint,
    layout: Layout,
    dtypes: Mapping[str, torch.dtype],
    headers: Mapping[str, TensorInfo],
    values: Iterator[tuple[str, slice, Tensor]],
) -> Iterator[tuple[str, slice, Tensor]]:
    """(their name, rows, values): the embedding under all its names, unread heads as zeros."""
    for ours, rows, part in values:
        for theirs in their_names(layout, ours):
            yield theirs, rows, part.to(dtypes[ours])
    for theirs, (ours, shape) in tensor_list(checkpoint.config, layout).items():
        if ours == UNREAD:
            dtype = TORCH_DTYPES[headers[theirs].dtype]
            step = max(1, SLAB_BYTES // (shape[1] * dtype.itemsize))
            for start in range(0, shape[0], step):
                rows = slice(start, min(start + step, shape[0]))
                yield theirs, rows, torch.zeros(rows.stop - start, shape[1], dtype=dtype)
