"""openpi's JAX parameters as a checkpoint: its tensors, with LoRA merged while they are read.

LoRA: a leaf W has factors A and B, and the model computes with W + s · A·B. In attention s is
alpha / rank, in the feed-forward layers 1. The factor A of the attention's output is summed over
heads before B is applied, which is to say that every head has the sum of all heads' B. Source:
openpi's `models/lora.py` and `models/gemma.py`, where alpha is the rank in both published variants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi0.checkpoint.chunk import ChunkReader
from pi0.checkpoint.files import (
    DTYPE_NAMES,
    SLAB_BYTES,
    TORCH_DTYPES,
    TensorInfo,
    get_nested,
    require_finite,
)
from pi0.checkpoint.jax_leaves import (
    ATTENTION_OUT,
    Index,
    Leaf,
    expected_shape,
    find_sizes,
    is_adaptive,
    leaves,
    lora_leaves,
)
from pi0.checkpoint.layouts import EMBEDDING, NameMap
from pi0.checkpoint.orbax import ArrayFolder, ArrayReader, ArraySpec, open_folder, write_folder
from pi0.config import Pi0Config
from pi0.errors import CheckpointError, ConfigError
from pi0.findings import Finding, warning

LISTED = 8
LARGEST = 1e6  # of ranks and alphas
TRUNKS = ("VLM", "expert")
# Sizes that only these leaves tell: our field → axis.
HEADS = {
    "vision.num_heads": "n",
    "vlm.num_heads": "N",
    "vlm.num_kv_heads": "K",
    "vlm.head_dim": "H",
}


@dataclass(frozen=True)
class JaxParams:
    """A folder of JAX parameters, whose leaves are all there and fit each other.

    Attributes:
        table: the leaves that the model reads.
        lora: factor s of each leaf that has LoRA.
        findings: what is assumed.
    """

    source: ArrayFolder
    table: Mapping[str, Leaf]
    lora: Mapping[str, float]
    heads: Mapping[str, int]
    findings: list[Finding]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Our tensors' shapes and dtypes, by leaf and place in it, such as ".../w[0, 1]"."""
        return {
            name: TensorInfo(
                self.source.manifest,
                leaf.our_shape(self.source.arrays[of].shape),
                "F32" if of in self.lora else self.source.arrays[of].dtype,
            )
            for name, of, leaf, _, _ in self._places()
        }

    @property
    def names(self) -> NameMap:
        ours = {name: target for name, _, _, _, target in self._places()}
        merged = f", with LoRA merged into {len(self.lora)} of them" if self.lora else ""
        return NameMap(
            layout="jax",
            explanation=f"openpi's JAX parameters: {len(self.table)} leaves{merged}",
            ours=ours,
            unread=[],
            buffers={},
            unexpected=[],
            embeddings=[name for name, target in ours.items() if target == EMBEDDING],
        )

    def stream(
        self, tensors: Mapping[str, TensorInfo], check_finite: bool = True
    ) -> Iterator[tuple[str, slice, Tensor]]:
        """Yields (name, rows, values) of each tensor, leaf by leaf; see `files.stream`.

        Raises:
            CheckpointError: damaged files; values that are not finite, of LoRA in any case.
        """
        for of, leaf in self.table.items():
            shape = self.source.arrays[of].shape
            wanted = [(_name(of, i), i) for i, _ in leaf.tensors(shape) if _name(of, i) in tensors]
            if not wanted:
                continue
            with self.source.open(of) as array:
                for name, index in wanted:
                    for rows, part in _slabs(array, index, leaf, tensors[name]):
                        if of in self.lora:
                            part = part.float() + self._delta(of, index)
                        if check_finite:
                            require_finite(self.source.folder, of, part)
                        yield name, rows, leaf.to_ours(part)

    def _delta(self, of: str, index: Index) -> Tensor:
        """What LoRA adds to a part of a leaf, float32."""
        factors = []
        for name in lora_leaves(of):
            with self.source.open(name) as array:
                values = array.read(index)
            require_finite(self.source.folder, name, values)
            factors.append(values.float())
        a, b = factors
        if ATTENTION_OUT in of:
            b = b.sum(0)
        return torch.matmul(a, b).mul_(self.lora[of])

    def _places(self) -> Iterator[tuple[str, str, Leaf, Index, str]]:
        """Our tensors: their name here, their leaf, where they lie in it, our name."""
        for of, leaf in self.table.items():
            for index, target in leaf.tensors(self.source.arrays[of].shape):
                yield _name(of, index), of, leaf, index, target


def open_params(folder: Path, settings: Mapping[str, Any]) -> JaxParams:
    """The parameters in a folder `params`; reads metadata only.

    Args:
        settings: the content of config.json, which may state `lora.alpha` and `lora.rank`: a
            number, or two, of the VLM and of the expert.

    Raises:
        CheckpointError: a damaged folder, leaves that are missing, unexpected or do not fit.
        ConfigError: config.json contradicts the leaves.
        Pi0Error: tensorstore is not installed.
    """
    source = open_folder(folder)
    arrays = source.arrays
    table = leaves(is_adaptive(arrays))
    adapted = {_part(of) for of in table if any(name in arrays for name in lora_leaves(of))}
    with_lora = [of for of in table if _part(of) in adapted]
    expected = {*table, *(name for of in with_lora for name in lora_leaves(of))}
    _require_leaves(folder, expected, set(arrays))
    for name, array in arrays.items():
        if array.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{folder}: {name}: expected bfloat16, float32 or float16, found {array.dtype}."
            )
    try:
        sizes = find_sizes(table, {name: arrays[name].shape for name in table})
    except ValueError as misfit:
        name, shape, found = misfit.args
        raise CheckpointError(
            f"{folder}: {name}: expected shape [{', '.join(map(str, shape))}] ("
            f"{' '.join(table[name].axes)}) as the other leaves have it, found {list(found)}. The "
            "folder is not of one model: copy or download it again."
        ) from misfit
    scales = _Scales(folder, settings, {of: _rank(folder, of, arrays) for of in with_lora})
    lora = {of: scales.of(of, arrays) for of in with_lora}
    heads = {field: sizes[axis] for field, axis in HEADS.items()}
    return JaxParams(source, table, lora, heads, scales.findings)


def write_params(
    folder: Path,
    config: Pi0Config,
    dtypes: Mapping[str, torch.dtype],
    values: Iterable[tuple[str, slice, Tensor]],
) -> None:
    """Writes the weights of a model as openpi's JAX parameters; inverse of `open_params`.

    A chunk is one layer, so that neither writing nor reading needs room for a leaf.

    Args:
        folder: `params`, made here.
        dtypes: float32 or bfloat16, by our names; a leaf of several has float32.
        values: (our name, rows, values) of every tensor, each row once.

    Raises:
        Pi0Error: the folder cannot be written, or tensorstore is not installed.
    """
    table = leaves(config.adaptive_norm)
    sizes = _sizes(config)
    shapes = {of: expected_shape(leaf, sizes) for of, leaf in table.items()}
    places = {
        target: (of, index)
        for of, leaf in table.items()
        for index, target in leaf.tensors(shapes[of])
    }
    specs: dict[str, ArraySpec] = {}
    stored: dict[str, torch.dtype] = {}
    for ours, (of, index) in places.items():
        stored[of] = max(stored.get(of, dtypes[ours]), dtypes[ours], key=lambda d: d.itemsize)
        shape, counted = shapes[of], len(index)
        chunks = (1,) * counted + shape[counted:]
        if ours == EMBEDDING:
            rows = max(1, SLAB_BYTES // (shape[1] * stored[of].itemsize))
            chunks = (min(rows, shape[0]), shape[1])
        specs[of] = ArraySpec(shape, chunks, DTYPE_NAMES[stored[of]])

    def parts() -> Iterator[tuple[str, tuple[int | slice, ...], Tensor]]:
        held: list[Tensor] = []  # of a tensor that comes in several slabs
        for ours, rows, part in values:
            of, index = places[ours]
            if ours == EMBEDDING:
                yield of, (rows,), part.to(stored[of])
            elif rows.stop < table[of].our_shape(shapes[of])[0]:
                held.append(part.clone())
            else:
                whole = torch.cat([*held, part]) if held else part
                held.clear()
                yield of, index, table[of].to_part(whole.to(stored[of]), shapes[of])

    write_folder(folder, specs, parts())


def _sizes(config: Pi0Config) -> dict[str, int]:
    """The size of every axis of the leaves."""
    vision, vlm, expert = config.vision, config.vlm, config.expert
    return {
        "l": vision.depth, "w": vision.width, "m": vision.mlp_dim, "n": vision.num_heads,
        "h": vision.head_dim, "p": vision.patch_size, "q": vision.patch_size,
        "s": vision.num_patches, "L": vlm.depth, "N": vlm.num_heads, "K": vlm.num_kv_heads,
        "H": vlm.head_dim, "V": config.vocab_size, "D": vlm.width, "M": vlm.mlp_dim,
        "E": expert.width, "F": expert.mlp_dim, "A": config.action_dim, "S": config.state_dim,
    }  # fmt: skip


class _Scales:
    """The factors of LoRA, from the ranks of the leaves and what config.json states."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], leaf_ranks: Mapping[str, int]
    ) -> None:
        self.folder = folder
        self.alphas, self.ranks = (_stated(settings, name) for name in ("alpha", "rank"))
        self.one_alpha = not isinstance(get_nested(settings, "lora.alpha"), list | None)
        self.leaf_ranks = leaf_ranks
        # The rank of most leaves of the VLM (0) and of the expert (1).
        self.found: dict[int, int] = {}
        for trunk in {_trunk(of) for of in leaf_ranks}:
            ranks = [rank for of, rank in leaf_ranks.items() if _trunk(of) == trunk]
            self.found[trunk] = max(ranks, key=ranks.count)
        self.findings: list[Finding] = []

    def of(self, leaf_name: str, arrays: Mapping[str, Any]) -> float:
        """The factor of a leaf, whose two factors are checked."""
        shape = arrays[leaf_name].shape
        a, b = lora_leaves(leaf_name)
        rank, trunk = self.leaf_ranks[leaf_name], _trunk(leaf_name)
        if rank != self.found[trunk]:
            raise CheckpointError(
                f"{self.folder}: {a}: expected rank {self.found[trunk]}, as the other leaves of "
                f"the {TRUNKS[trunk]} have it, found {rank}. The folder is not of one model: copy "
                "or download it again."
            )
        needed = {a: (*shape[:-1], rank), b: (*shape[:-2], rank, shape[-1])}
        for name, expected in needed.items():
            if arrays[name].shape != expected:
                raise CheckpointError(
                    f"{self.folder}: {name}: expected shape {list(expected)}, of rank {rank} as in "
                    f"{a.rpartition('/')[2]}, found {list(arrays[name].shape)}. The folder is not "
                    "of one model: copy or download it again."
                )
        if self.one_alpha and len(set(self.found.values())) > 1:
            raise ConfigError(
                "config.json lora.alpha: expected two numbers, of the VLM and of the expert, whose "
                f"ranks are {self.found[0]} and {self.found[1]}, found one."
            )
        if self.ranks and self.ranks[trunk] != rank:
            raise ConfigError(
                f"config.json lora.rank: expected {rank} as {a} has it, found "
                f"{self.ranks[trunk]:g}. Put the config.json that belongs to this checkpoint "
                "beside it."
            )
        if "/mlp" in leaf_name:
            return 1.0
        if not self.alphas and not self.findings:
            self.findings.append(
                warning(
                    "lora-alpha-assumed",
                    f"{self.folder}: no file says the alpha of its LoRA; the rank is assumed, as "
                    "in openpi's variants. State it in config.json, for the VLM and the expert: "
                    '{"lora": {"alpha": [16, 32]}}, if it was 16 and 32.',
                )
            )
        return self.alphas[trunk] / rank if self.alphas else 1.0


def _trunk(leaf_name: str) -> int:
    """Whose leaf of the layers it is: 0 is the VLM, 1 the expert."""
    return 1 if "_1/" in leaf_name else 0


def _part(leaf_name: str) -> tuple[int, str]:
    """What has LoRA in all of its leaves or in none: attention or MLP of a trunk."""
    kind = next((kind for kind in ("/attn/", "/mlp") if kind in leaf_name), leaf_name)
    return _trunk(leaf_name), kind


def _rank(folder: Path, leaf_name: str, arrays: Mapping[str, Any]) -> int:
    """The rank of a leaf's LoRA, as its first factor has it."""
    a, _ = lora_leaves(leaf_name)
    shape = arrays[a].shape
    if not shape or not shape[-1]:
        raise CheckpointError(
            f"{folder}: {a}: expected factors of rank 1 or more, found shape {list(shape)}. The "
            "folder is damaged: copy or download it again."
        )
    return int(shape[-1])


def _stated(settings: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """What config.json states for VLM and expert; None: nothing."""
    value = get_nested(settings, f"lora.{name}")
    if value is None:
        return None
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or not all(type(n) in (int, float) and 0 < n <= LARGEST for n in pair):
        raise ConfigError(
            f"config.json lora.{name}: expected a positive number, or two (of the VLM and of the "
            f"expert), found {str(value)[:60]}."
        )
    return float(pair[0]), float(pair[1])


def _require_leaves(folder: Path, expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    faults = [
        f"{len(names)} {what}: {', '.join(names[:LISTED])}{', ...' if names[LISTED:] else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{folder}: expected the {len(expected)} leaves of openpi's JAX parameters, found "
            f"{'; '.join(faults)}. Copy or download the whole folder of a π0 or π0.5; π0-FAST "
            "and other models are not read."
        )


def _slabs(
    array: ArrayReader | ChunkReader, index: Index, leaf: Leaf, info: TensorInfo
) -> Iterator[tuple[slice, Tensor]]:
    """One of our tensors, whole; the token embedding in slabs of rows."""
    if leaf.targets != (EMBEDDING,):
        yield slice(0, info.shape[0]), array.read(index)
        return
    step = max(1, SLAB_BYTES * info.shape[0] // max(1, info.bytes))
    for start in range(0, info.shape[0], step):
        rows = slice(start, min(start + step, info.shape[0]))
        yield rows, array.read((rows,))


def _name(of: str, index: Index) -> str:
    return f"{of}{list(index)}" if index else of
