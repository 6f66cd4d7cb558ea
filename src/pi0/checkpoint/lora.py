"""LoRA adapters as PEFT saves them: found with their base, checked, merged while weights stream.

A folder holds adapter_config.json and adapter_model.safetensors, whose keys are
`base_model.model.` + the name of a module + `.lora_A.weight` or `.lora_B.weight`. A module's weight
becomes W + s · B·A, with s = alpha / r, or alpha / √r with rslora (arXiv:2106.09685, 2312.03732).
Keys without `lora_` hold tensors that were trained as a whole (modules_to_save, biases) and replace
the base's.

Matched by our names, so that adapter and base may be of different layouts. Everything in
adapter_config.json that would change the result and is not carried out is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi0.checkpoint.files import TORCH_DTYPES, TensorInfo, read_headers, read_json, stream
from pi0.checkpoint.layouts import NameMap, is_unread, our_name
from pi0.checkpoint.locate import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_adapter, find_base
from pi0.errors import CheckpointError, ConfigError

PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.lora_(A|B)\.weight")
# Where PEFT wraps a module, the module's own tensors lie one level deeper.
WRAPPED = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")
# Starts of training that leave the base's weights as they are.
BIASES = ("none", "all", "lora_only")
LARGEST = 1e6  # of ranks and alphas
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Fields that are read, and those that say nothing of the result. Any other has to be unset.
KNOWN = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "peft_type",
         "modules_to_save", "init_lora_weights", "base_model_name_or_path"} | {
    "auto_mapping", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "target_modules", "task_type"}  # fmt: skip


@dataclass(frozen=True)
class LoraPair:
    """The keys of A [r, in] and B [out, r], and the factor of their product."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter whose headers were read.

    Attributes:
        folder: where it lies.
        base: the checkpoint that it changes, a folder or a file.
        tensors: its tensors by its keys.
        pairs: our name of a weight → what is added to it.
        replaced: our name of a tensor → the key of the one that takes its place.
        bias: which biases it has trained: none, all or lora_only.
        saved: the modules that it holds whole.
    """

    folder: Path
    base: Path
    tensors: Mapping[str, TensorInfo]
    pairs: Mapping[str, LoraPair]
    replaced: Mapping[str, str]
    bias: str
    saved: tuple[str, ...] = ()

    @property
    def files(self) -> list[Path]:
        """What the merged weights depend on, besides the base."""
        return [self.folder / ADAPTER_WEIGHTS, self.folder / ADAPTER_CONFIG]

    @property
    def ranks(self) -> list[int]:
        return sorted({self.tensors[pair.a].shape[0] for pair in self.pairs.values()})

    def apply(
        self, tensors: Mapping[str, TensorInfo], names: NameMap
    ) -> tuple[dict[str, TensorInfo], NameMap]:
        """The base's tensors and names with those that the adapter replaces.

        Raises:
            CheckpointError: the adapter does not fit the base.
        """
        theirs = {ours: name for name, ours in names.ours.items()}
        self._check(theirs, tensors)
        lost = {theirs[ours] for ours in self.replaced}
        new = {key: ours for ours, key in self.replaced.items()}
        merged = {name: info for name, info in tensors.items() if name not in lost}
        kept = {name: ours for name, ours in names.ours.items() if name not in lost}
        embeddings = [
            self.replaced[names.ours[name]] if name in lost else name for name in names.embeddings
        ]
        return merged | {key: self.tensors[key] for key in new}, replace(
            names, ours=kept | new, embeddings=embeddings
        )

    def read(self, names: Container[str]) -> dict[str, LowRank]:
        """What is added to the weights of these names (ours), in memory.

        Raises:
            CheckpointError: a factor holds NaN or infinite values.
        """
        pairs = {ours: pair for ours, pair in self.pairs.items() if ours in names}
        wanted = {key: self.tensors[key] for pair in pairs.values() for key in (pair.a, pair.b)}
        values = {key: torch.empty(info.shape) for key, info in wanted.items()}
        for key, rows, part in stream(wanted):
            values[key][rows].copy_(part)
        return {
            ours: LowRank(values[pair.a].flatten(1), values[pair.b].flatten(1), pair.scale)
            for ours, pair in pairs.items()
        }

    def _check(self, theirs: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
        """Raises CheckpointError unless every part of the adapter has its place in the base."""
        for ours in (*self.pairs, *self.replaced):
            if ours not in theirs:
                self._misfit(ours, "the base to have it", "no such tensor there")
        for ours, pair in self.pairs.items():
            out, *into = tensors[theirs[ours]].shape
            a, b = (self.tensors[key].shape for key in (pair.a, pair.b))
            if (b[0], list(a[1:])) != (out, into):
                self._misfit(ours, f"factors of a weight {[out, *into]}", f"of {[b[0], *a[1:]]}")
        for ours, key in self.replaced.items():
            expected, found = tensors[theirs[ours]].shape, self.tensors[key].shape
            if found != expected:
                self._misfit(ours, f"shape {list(expected)}", f"{list(found)}")
        for ours, key in self.replaced.items():  # of a module that was trained whole, all of it
            stem = ours.rpartition(".")[0]
            rest = [name for name in (f"{stem}.weight", f"{stem}.bias") if name in theirs]
            lost = [name for name in rest if name not in self.replaced]
            if lost and any(f".{module}." in WRAPPED.sub("", key) for module in self.saved):
                self._misfit(lost[0], f"it beside {key}, of modules_to_save", "it missing")
        weights = theirs if self.bias == "all" else self.pairs if self.bias == "lora_only" else ()
        biases = {f"{name.removesuffix('.weight').removesuffix('.bias')}.bias" for name in weights}
        lost = sorted((biases & theirs.keys()) - self.replaced.keys())
        if lost:
            self._misfit(lost[0], f"it in the adapter, whose bias is {self.bias!r}", "it missing")

    def _misfit(self, ours: str, expected: str, found: str) -> None:
        raise CheckpointError(
            f"{self.folder}: {ours}: expected {expected}, found {found}. The adapter is another "
            f"model's than {self.base}: name the one that it was trained on with --base."
        )


@dataclass(frozen=True)
class LowRank:
    """A [r, in] and B [out, r] float32, and the factor of their product."""

    a: Tensor
    b: Tensor
    scale: float

    def add_to(self, rows: slice, values: Tensor) -> Tensor:
        """Rows of a weight [n, ...] plus those of the product, float32."""
        flat = values.float().flatten(1)
        return torch.addmm(flat, self.b[rows], self.a, alpha=self.scale).view(values.shape)


def open_adapter(path: Path | str, base: Path | str | None) -> Adapter | None:
    """The adapter that a path means, with its base; None: the path means something else.

    Args:
        base: the full model; None: the one that adapter_config.json names, if it lies there.

    Raises:
        CheckpointError: a file is missing or damaged, the base is not found, or the adapter is one
            that is not read.
        ConfigError: a base is named, but the path is no adapter.
    """
    folder = find_adapter(path, named=base is not None)
    if folder is None:
        if base is not None:
            raise ConfigError(
                f"base (--base): expected only with a PEFT adapter, found no adapter in {path}. "
                "Leave it out."
            )
        return None
    config = read_json(folder / ADAPTER_CONFIG)
    _refuse_variants(folder / ADAPTER_CONFIG, config)
    tensors = read_headers([folder / ADAPTER_WEIGHTS])
    pairs, replaced = _assign(folder / ADAPTER_WEIGHTS, tensors, _Scales(folder, config))
    saved = _saved_modules(folder, config, tensors)
    bias = config.get("bias") or "none"
    if bias not in BIASES:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: bias: expected one of {', '.join(BIASES)}, found {bias!r}."
        )
    found = find_base(folder, config.get("base_model_name_or_path"), base)
    return Adapter(folder, found, tensors, pairs, replaced, bias, saved)


def _refuse_variants(file: Path, config: Mapping[str, Any]) -> None:
    merge = "Merge it first with peft's merge_and_unload, and save the whole model."
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type: expected LORA, found {kind!r}. {merge}")
    # A list, since 1 == True: no other value of that kind is one of peft's.
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        raise CheckpointError(
            f"{file}: init_lora_weights: expected a start that leaves the base as it is, found "
            f"{start!r}. {merge}"
        )
    for name, value in config.items():
        if name not in KNOWN and value:
            raise CheckpointError(
                f"{file}: {name}: expected it unset, since plain LoRA is all that is read, found "
                f"{str(value)[:60]!r}. {merge}"
            )


class _Scales:
    """Ranks and factors of modules, as adapter_config.json states them."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.file = folder / ADAPTER_CONFIG
        self.rank = self._number("r", config.get("r", 8))
        self.alpha = self._number("lora_alpha", config.get("lora_alpha", 8))
        self.ranks, self.alphas = (
            self._patterns(name, config.get(name)) for name in ("rank_pattern", "alpha_pattern")
        )
        self.root = config.get("use_rslora") or False
        if not isinstance(self.root, bool):
            raise CheckpointError(
                f"{self.file}: use_rslora: expected true or false, found {self.root!r}."
            )

    def of(self, module: str, rank: int) -> float:
        """The factor of a module whose A has so many rows."""
        stated = self._match(self.ranks, module, self.rank)
        if rank != stated:
            raise CheckpointError(
                f"{self.file}: {module}: expected rank {stated:g}, as it states, found lora_A of "
                f"rank {rank}. Copy both files of the same adapter."
            )
        return self._match(self.alphas, module, self.alpha) / (
            math.sqrt(rank) if self.root else rank
        )

    def _match(self, patterns: Mapping[str, float], module: str, default: float) -> float:
        # As peft's get_pattern_key: the first pattern that the end of the name matches.
        found = (n for key, n in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        return next(found, default)

    def _patterns(self, name: str, value: Any) -> dict[str, float]:
        if not isinstance(value or {}, Mapping):
            raise CheckpointError(f"{self.file}: {name}: expected an object, found {value!r}.")
        for key in value or {}:
            try:
                re.compile(key)
            except re.error as error:
                raise CheckpointError(
                    f"{self.file}: {name}: expected regular expressions, found {key!r} ({error})."
                ) from error
        return {key: self._number(f"{name}.{key}", n) for key, n in (value or {}).items()}

    def _number(self, name: str, value: Any) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= LARGEST:
            raise CheckpointError(
                f"{self.file}: {name}: expected a number from 0 to {LARGEST:g}, found "
                f"{str(value)[:60]}."
            )
        return float(value)


def _assign(
    file: Path, tensors: Mapping[str, TensorInfo], scales: _Scales
) -> tuple[dict[str, LoraPair], dict[str, str]]:
    """Which weights are changed and which tensors replaced, by our names."""
    factors: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    unknown = []
    for key, info in tensors.items():
        name = WRAPPED.sub("", key.removeprefix(PREFIX)) if key.startswith(PREFIX) else ""
        factor = FACTOR.fullmatch(name)
        target = f"{factor[1]}.weight" if factor else name
        ours = our_name(target)
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{file}: {key}: expected BF16 or F32, found {info.dtype}.")
        if ours is None:
            unknown += [] if is_unread(target) else [key]
        elif factor is None:
            _refuse_twice(file, replaced.get(ours), key)
            replaced[ours] = key
        else:
            module = factors.setdefault(ours, {"module": factor[1]})
            _refuse_twice(file, module.get(factor[2]), key)
            module[factor[2]] = key
    if unknown or not (factors or replaced):
        found = f"{len(unknown)} others, such as {unknown[0]}" if unknown else "none"
        raise CheckpointError(
            f"{file}: expected keys {PREFIX}MODULE.lora_A.weight and lora_B.weight of modules of "
            f"π0, found {found}. It is not an adapter of this model, or not plain LoRA."
        )
    pairs = dict(_pairs(file, tensors, factors, scales))
    both = sorted(pairs.keys() & replaced.keys())
    if both:
        raise CheckpointError(
            f"{file}: {both[0]}: expected factors or the whole tensor, found both. The file is of "
            "no single adapter: save it again."
        )
    return pairs, replaced


def _pairs(
    file: Path,
    tensors: Mapping[str, TensorInfo],
    factors: Mapping[str, Mapping[str, str]],
    scales: _Scales,
) -> Iterator[tuple[str, LoraPair]]:
    for ours, keys in factors.items():
        module = keys["module"]
        if len(keys) < 3:
            raise CheckpointError(
                f"{file}: {module}: expected lora_A and lora_B, found lora_{list(keys)[1]} "
                "alone. Copy or download the file again."
            )
        a, b = (tensors[keys[factor]].shape for factor in "AB")
        if len(a) < 2 or len(b) < 2 or a[0] != math.prod(b[1:]):
            raise CheckpointError(
                f"{file}: {module}: expected lora_A [r, in] and lora_B [out, r] of one rank, found "
                f"{list(a)} and {list(b)}. The file is damaged: copy or download it again."
            )
        yield ours, LoraPair(keys["A"], keys["B"], scales.of(module, a[0]))


def _refuse_twice(file: Path, first: str | None, second: str) -> None:
    if first is not None:
        raise CheckpointError(
            f"{file}: expected one tensor for each place, found {first} and {second}, which are "
            "the same. Save the adapter again."
        )


def _saved_modules(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[str, ...]:
    """modules_to_save, each of which must have a tensor in the file."""
    plain = [WRAPPED.sub("", key) for key in tensors if ".lora_" not in key]
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: modules_to_save: expected a list of names, found "
            f"{str(saved)[:60]!r}."
        )
    for module in saved:
        if not any(f".{module}." in key for key in plain):
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: expected the tensors of {module}, which "
                f"{ADAPTER_CONFIG} lists in modules_to_save, found none. Copy both files of the "
                "same adapter."
            )
    return tuple(saved)
