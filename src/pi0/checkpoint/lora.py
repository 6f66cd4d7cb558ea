"""LoRA adapters as PEFT saves them: found with their base, checked, merged while weights stream.

A folder holds adapter_config.json and adapter_model.safetensors, whose keys are
`base_model.model.` + the name of a module + `.lora_A.weight` or `.lora_B.weight`. A module's weight
becomes W + s · B·A, with s = alpha / r, or alpha / √r with rslora (arXiv:2106.09685, 2312.03732).
Keys without `lora_` hold tensors that were trained as a whole (modules_to_save, biases) and replace
the base's.

Matched by our names, so that adapter and base may be of different layouts. The file must hold what
peft makes for its adapter_config.json (`lora_config.py`), neither less nor more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pi0.checkpoint.files import TORCH_DTYPES, TensorInfo, read_headers, stream
from pi0.checkpoint.layouts import (
    EMBEDDINGS,
    NameMap,
    is_unread,
    module_name,
    our_name,
    spelling_of,
)
from pi0.checkpoint.locate import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_adapter, find_base
from pi0.checkpoint.lora_config import MERGE, LoraConfig, read_lora_config
from pi0.errors import CheckpointError, ConfigError

PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.lora_(A|B)\.weight")
WEIGHT = r"\1.weight"  # that a factor changes
# Where PEFT wraps a module, the module's own tensors lie one level deeper.
SAVED, ORIGINAL = ".modules_to_save.", ".original_module."
WRAPPED = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")


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
        config: what adapter_config.json states.
    """

    folder: Path
    base: Path
    tensors: Mapping[str, TensorInfo]
    pairs: Mapping[str, LoraPair]
    replaced: Mapping[str, str]
    config: LoraConfig

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
        self._check_targets(theirs, tensors)
        bias = self.config.bias
        weights = theirs if bias == "all" else self.pairs if bias == "lora_only" else ()
        biases = {f"{name.removesuffix('.weight').removesuffix('.bias')}.bias" for name in weights}
        lost = sorted((biases & theirs.keys()) - self.replaced.keys())
        if lost:
            self._misfit(lost[0], f"it in the adapter, whose bias is {bias!r}", "it missing")

    def _check_targets(self, theirs: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
        """Raises CheckpointError unless the adapter has what peft makes for its configuration."""
        targets = self.config.targets
        layout = spelling_of(FACTOR.sub(WEIGHT, _plain(key)) for key in self.tensors)
        for ours, theirs_of_base in theirs.items():
            name, axes = module_name(layout, ours), len(tensors[theirs_of_base].shape)
            linear = axes == 2 and ours not in EMBEDDINGS
            expected = axes > 1 and targets.adapts(name.removesuffix(".weight"), linear)
            if expected != (ours in self.pairs):
                what = "lora_A and lora_B" if expected else "no lora_A and lora_B"
                self._mismatch(ours, what, "target_modules")
            if targets.saves(name) and ours not in self.replaced:
                self._mismatch(ours, "the whole tensor", "modules_to_save")

    def _mismatch(self, what: str, expected: str, field: str) -> None:
        raise CheckpointError(
            f"{self.folder / ADAPTER_WEIGHTS}: {what}: expected {expected}, as {field} of "
            f"{ADAPTER_CONFIG} says, found {'some' if expected.startswith('no ') else 'none'}. "
            "Copy both files of the same adapter, or name the base that it was trained on with "
            "--base."
        )

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
        if base is not None and Path(path).expanduser().exists():
            raise ConfigError(
                f"base (--base): expected only with a PEFT adapter, found no adapter in {path}. "
                "Leave it out."
            )
        return None
    config = read_lora_config(folder / ADAPTER_CONFIG)
    headers = read_headers([folder / ADAPTER_WEIGHTS])
    tensors = {key: info for key, info in headers.items() if not _is_copy(key, headers)}
    pairs, replaced = _assign(folder / ADAPTER_WEIGHTS, tensors, config)
    return Adapter(folder, find_base(folder, config.base, base), tensors, pairs, replaced, config)


def _assign(
    file: Path, tensors: Mapping[str, TensorInfo], config: LoraConfig
) -> tuple[dict[str, LoraPair], dict[str, str]]:
    """Which weights are changed and which tensors replaced, by our names."""
    factors: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    unknown = []
    for key, info in tensors.items():
        name = _plain(key)
        factor = FACTOR.fullmatch(name)
        target = f"{factor[1]}.weight" if factor else name
        ours = our_name(target)
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{file}: {key}: expected BF16, F32 or F16, found {info.dtype}.")
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
    pairs = dict(_pairs(file, tensors, factors, config))
    both = sorted(pairs.keys() & replaced.keys())
    if both:
        raise CheckpointError(
            f"{file}: {both[0]}: expected factors or the whole tensor, found both, as of a module "
            f"to save that has factors inside. {MERGE}"
        )
    return pairs, replaced


def _pairs(
    file: Path,
    tensors: Mapping[str, TensorInfo],
    factors: Mapping[str, Mapping[str, str]],
    config: LoraConfig,
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
        yield ours, LoraPair(keys["A"], keys["B"], config.scale(module, a[0]))


def _plain(key: str) -> str:
    """The name that a key's tensor, or its factor, has in the model; empty for no key of PEFT's."""
    return WRAPPED.sub("", key.removeprefix(PREFIX)) if key.startswith(PREFIX) else ""


def _is_copy(key: str, keys: Container[str]) -> bool:
    """Whether a key is one that `bias: all` adds of a module that is saved whole: the base's own
    bias, or the trained one once more, of a module inside with the adapter's name in between."""
    module, saved, rest = key.partition(SAVED)
    again = (f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}")
    return ORIGINAL in key or (bool(saved) and any(other in keys for other in again))


def _refuse_twice(file: Path, first: str | None, second: str) -> None:
    if first is not None:
        raise CheckpointError(
            f"{file}: expected one tensor for each place, found {first} and {second}, which are "
            "the same. Save the adapter again."
        )
