"""Weights as fast engines want them: fused, in parts that fit a cache, perhaps quantised.

A checkpoint is streamed into place slab by slab, so that packing needs little memory beyond the
result. What is packed can be kept in a file and mapped at the next start (`weight_cache.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from pi0.checkpoint.load import (
    POSITION,
    Checkpoint,
    Progress,
    check,
    empty_model,
    resize_positions,
)
from pi0.config import GemmaConfig, Pi0Config
from pi0.engines.fast.matrix import PARTS, Matrix, as_it_is, quantised
from pi0.engines.folded_actions import fold_actions
from pi0.errors import CheckpointError

BLOCK = re.compile(r"(vision_tower|vlm|expert)\.blocks\.(\d+)\.(\w+)\.(weight|bias)")
EMBEDDING = "token_embedding.weight"
MODULATION = ".dense."  # in the names of an adaptive norm's linear layer
NORM_BEFORE = {  # the norm that a matrix of a block reads
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "norm1"),
    **dict.fromkeys(("gate_proj", "up_proj", "fc1"), "norm2"),
}
EQUALISER = "equaliser"  # of an adaptive norm, under its name
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Target(NamedTuple):
    """Where a part of a parameter goes: its rows and columns, into a matrix from row `at` on."""

    matrix: str
    at: int
    rows: slice
    columns: slice = slice(None)


@dataclass(frozen=True)
class Scheme:
    """How an engine wants its weights.

    Attributes:
        dtype: of activations, and of matrices that `dtype_by_pattern` does not name.
        dtype_by_pattern: dtype of a matrix, by a pattern that its whole name matches; the first
            match counts.
        mlp_chunk: hidden units of Gemma's MLP that are computed at a time, few enough for a
            cache: gate and up of these, and the columns of `down` that they meet.
    """

    dtype: torch.dtype
    dtype_by_pattern: dict[str, torch.dtype] = field(default_factory=dict)
    mlp_chunk: int = 4096

    def dtype_of(self, matrix: str) -> torch.dtype:
        found = (d for pattern, d in self.dtype_by_pattern.items() if re.fullmatch(pattern, matrix))
        return next(found, self.dtype)


class PackedWeights:
    """Matrices and other tensors by name; the names are the model's, or those of what is fused.

    Gemma's norms hold 1 + w. In π0 the two linear layers on the actions are one (`actions`), and
    what time adds to it has a matrix of its own (`time`). In π0.5 the linear layers of the expert's
    norms are kept as they are stored: they are used once for all calls.
    """

    def __init__(self, config: Pi0Config, scheme: Scheme) -> None:
        self.config = config
        self.scheme = scheme
        self.tensors: dict[str, Tensor] = {}
        self.matrices: dict[str, Matrix] = {}
        self._mlp_chunks: dict[str, list[Matrix]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def matrix(self, name: str) -> Matrix:
        return self.matrices[name]

    def mlp_chunks(self, name: str) -> list[Matrix]:
        """The parts of a matrix that comes in several."""
        if name not in self._mlp_chunks:
            count = sum(key.rpartition(".")[0] == name for key in self.matrices)
            self._mlp_chunks[name] = [self.matrices[f"{name}.{i}"] for i in range(count)]
        return self._mlp_chunks[name]

    def state(self) -> dict[str, Tensor]:
        """All tensors, by names from which `restore` makes the same weights again."""
        state = dict(self.tensors)
        for name, matrix in self.matrices.items():
            for kind in PARTS:
                tensor = getattr(matrix, kind)
                if tensor is not None:
                    state[f"{name}:{kind}"] = tensor
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave."""
        for name, tensor in state.items():
            matrix, _, kind = name.partition(":")
            if not kind:
                self.tensors[name] = tensor
            elif kind == "weight":
                rest = (state.get(f"{matrix}:{kind}") for kind in PARTS[1:])
                self.matrices[matrix] = Matrix(tensor, *rest)

    def to(self, device: torch.device) -> PackedWeights:
        """Moved to a device, in place."""
        self.restore({name: tensor.to(device) for name, tensor in self.state().items()})
        return self


@torch.inference_mode()
def pack(
    checkpoint: Checkpoint,
    scheme: Scheme,
    image_size: int | None = None,
    progress: Progress = lambda _: None,
    scales: Mapping[str, Tensor] = NOTHING,
    lay_out: Callable[[Matrix], Matrix] = as_it_is,
) -> PackedWeights:
    """A checkpoint's weights, packed, on the CPU. Other arguments and errors: see `load_model`.

    Args:
        scales: by a norm's name [E] float32: its channels are divided by them, and columns of
            the matrices that read it are multiplied (`equalise.py`).
        lay_out: see `Kernels`.
    """
    check(checkpoint)
    native = checkpoint.config
    config = native if image_size is None else native.with_image_size(image_size)
    weights = allocated(checkpoint, PackedWeights(config, scheme), lay_out)
    fill(weights, checkpoint, progress, scales)
    for name, matrix in weights.matrices.items():
        # A NaN would pass for a number; in float32 it shows in the actions.
        if matrix.scale is not None and not torch.isfinite(matrix.scale).all():
            raise CheckpointError(
                f"{checkpoint.path}: expected finite weights, found NaN or infinite ones in "
                f"{name}. The file is damaged: copy or download it again."
            )
    return weights


def allocated(
    checkpoint: Checkpoint,
    weights: PackedWeights,
    lay_out: Callable[[Matrix], Matrix] = as_it_is,
) -> PackedWeights:
    """With room for a checkpoint's."""
    model = empty_model(weights.config, weights.scheme.dtype)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    _allocate(weights, shapes)
    weights.matrices = {name: lay_out(matrix) for name, matrix in weights.matrices.items()}
    dtypes = checkpoint.dtypes
    for name in [EMBEDDING, *(name for name in shapes if MODULATION in name)]:
        weights.tensors[name] = torch.empty(shapes[name], dtype=dtypes[name])
    return weights


def fill(
    weights: PackedWeights,
    checkpoint: Checkpoint,
    progress: Progress = lambda _: None,
    scales: Mapping[str, Tensor] = NOTHING,
) -> None:
    """Brings a checkpoint's parameters to their places; see `pack`."""
    config, native = weights.config, checkpoint.config
    for ours, rows, values in checkpoint.stream():
        read = values.nbytes
        if ours == POSITION and config.vision.grid != native.vision.grid:
            weights.tensors[ours].copy_(resize_positions(values, config.vision.grid))
        elif ours in weights.tensors:
            weights.tensors[ours][rows].copy_(values)
        else:
            put(weights, ours, rows, values, scales)
        progress(read)
    _fold(weights)
    for norm, scale in scales.items():
        affine = [f"{norm}.{kind}" for kind in ("weight", "bias")]
        for name in weights.tensors.keys() & affine:
            weights.tensors[name] /= scale
        if f"{norm}.weight" not in weights.tensors:
            weights.tensors[f"{norm}.{EQUALISER}"] = scale


def put(
    weights: PackedWeights, ours: str, rows: slice, values: Tensor, scales: Mapping[str, Tensor]
) -> None:
    """Puts a slab of a parameter into the matrices that it is a part of, if there are any."""
    norm = norm_before(ours)
    if norm is not None and norm in scales and ours.endswith(".weight"):
        values = values * scales[norm]
    for target in targets(weights.config, weights.scheme, ours):
        _put(weights, target, rows, values, ours.endswith(".bias"))


def norm_before(parameter: str) -> str | None:
    """The name of the norm whose result a block's matrix is multiplied with, by a parameter's."""
    block = BLOCK.fullmatch(parameter)
    if not block or block[3] not in NORM_BEFORE:
        return None
    return f"{block[1]}.blocks.{block[2]}.{NORM_BEFORE[block[3]]}"


def targets(config: Pi0Config, scheme: Scheme, name: str) -> list[Target]:
    """Where a parameter of the model goes; empty for what is no matrix or is never read."""
    if name.startswith("projector."):
        return [Target("projector", 0, slice(0, config.vlm.width))]
    block = BLOCK.fullmatch(name)
    if not block or "norm" in block[3]:
        return []
    trunk, layer, kind, _ = block.groups()
    into = f"{trunk}.blocks.{layer}"
    if trunk == "vision_tower":
        return _vision_targets(config.vision.width, into, kind)
    gemma = config.vlm if trunk == "vlm" else config.expert
    last = trunk == "vlm" and int(layer) == gemma.depth - 1
    return _gemma_targets(gemma, scheme.mlp_chunk, into, kind, last)


def _vision_targets(width: int, into: str, kind: str) -> list[Target]:
    if kind in ("q_proj", "k_proj", "v_proj"):
        return [Target(f"{into}.qkv", width * "qkv".index(kind[0]), slice(0, width))]
    return [Target(f"{into}.{kind}", 0, slice(0, None))]


def _gemma_targets(
    config: GemmaConfig, part: int, into: str, kind: str, last: bool
) -> list[Target]:
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if kind in ("k_proj", "v_proj"):
        at = 0 if kind == "k_proj" else kv
        return (
            [Target(f"{into}.kv", at, slice(0, kv))]
            if last
            else [Target(f"{into}.qkv", q + at, slice(0, kv))]
        )
    if last:
        return []  # only its keys and values are ever read
    if kind == "q_proj":
        return [Target(f"{into}.qkv", 0, slice(0, q))]
    if kind == "o_proj":
        return [Target(f"{into}.o_proj", 0, slice(0, config.width))]
    found = []
    for i, start in enumerate(range(0, config.mlp_dim, part)):
        units = slice(start, min(start + part, config.mlp_dim))
        if kind == "down_proj":
            found.append(Target(f"{into}.down.{i}", 0, slice(0, config.width), units))
        else:
            at = 0 if kind == "gate_proj" else units.stop - units.start
            found.append(Target(f"{into}.gate_up.{i}", at, units))
    return found


def _allocate(weights: PackedWeights, shapes: dict[str, torch.Size]) -> None:
    """Room for everything that is kept, but for what is kept as it is stored."""
    outputs: dict[str, int] = {}
    inputs: dict[str, int] = {}
    biased = set()
    for name, shape in shapes.items():
        found = targets(weights.config, weights.scheme, name)
        for target in found:
            start, stop, _ = target.rows.indices(shape[0])
            outputs[target.matrix] = max(outputs.get(target.matrix, 0), target.at + stop - start)
            if name.endswith(".bias"):
                biased.add(target.matrix)
            else:
                start, stop, _ = target.columns.indices(shape[1])
                inputs[target.matrix] = stop - start
        block = BLOCK.fullmatch(name)
        stored = name == EMBEDDING or MODULATION in name
        if not found and not stored and (not block or "norm" in block[3]):
            weights.tensors[name] = torch.empty(shape)
    for name, n in outputs.items():
        dtype = weights.scheme.dtype_of(name)
        weights.matrices[name] = Matrix(
            torch.empty(n, inputs[name], dtype=dtype),
            # A quantised product is finished in float32.
            torch.empty(n, dtype=torch.float32 if quantised(dtype) else dtype)
            if name in biased
            else None,
            torch.empty(n) if quantised(dtype) else None,
        )


def _put(weights: PackedWeights, target: Target, rows: slice, values: Tensor, bias: bool) -> None:
    """Puts the part of a slab (`rows` of a parameter) that belongs to a target."""
    begin = max(rows.start, target.rows.start)
    end = rows.start + len(values)
    if target.rows.stop is not None:
        end = min(end, target.rows.stop)
    if begin >= end:
        return
    matrix = weights.matrices[target.matrix]
    part = values[begin - rows.start : end - rows.start]
    at = target.at + begin - target.rows.start
    if bias:
        assert matrix.bias is not None
        matrix.bias[at : at + len(part)].copy_(part)
    else:
        matrix.write_rows(at, part[:, target.columns])


def _fold(weights: PackedWeights) -> None:
    """1 + w of Gemma's norms; in π0 both linear layers on the actions in one."""
    tensors = weights.tensors
    for name in tensors:
        gemmas = name.startswith(("vlm.", "expert.")) and name.endswith("weight")
        if gemmas and MODULATION not in name:
            tensors[name] += 1
    if weights.config.adaptive_norm:
        return
    first, second = (
        (tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias"))
        for name in ("action_in_proj", "action_time_mlp_in")
    )
    folded = fold_actions(first, second)
    tensors["actions.weight"] = folded.actions
    tensors["time.weight"], tensors["time.bias"] = folded.time, folded.bias
