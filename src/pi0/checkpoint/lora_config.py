"""adapter_config.json of a PEFT adapter: which modules it changes, and by how much.

Every field is carried out as peft 0.21 does, says nothing of the result, or is refused by name.
Sources: peft's `tuners/lora/{config,model}.py`, `tuners/tuners_utils.py`
(check_target_module_exists, _maybe_include_all_linear_layers), `utils/other.py` (get_pattern_key,
_set_trainable).

Knows names of modules only, no tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi0.checkpoint.files import read_json
from pi0.errors import CheckpointError
from pi0.number import is_number

BIASES = ("none", "all", "lora_only")
LARGEST = 1e6  # of ranks and alphas
# Starts of training that leave the base's weights as they are.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Fields that are read, and those that say nothing of the result. Any other has to be unset.
KNOWN = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "peft_type",
         "modules_to_save", "init_lora_weights", "base_model_name_or_path", "target_modules",
         "exclude_modules", "layers_to_transform", "layers_pattern"} | {
    "auto_mapping", "eva_config", "inference_mode", "lora_dropout", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "task_type"}  # fmt: skip
ALL_LINEAR = "all-linear"
# The number of the first list of modules that a module lies in, as in "model.layers.3.mlp".
FIRST_LAYER = r".*?\.[^.]*\.(?P<layer>\d+)\."
MERGE = "Merge it first with peft's merge_and_unload, and save the whole model."


@dataclass(frozen=True)
class Targets:
    """Which modules get factors.

    Attributes:
        modules: endings of names, or a regular expression of whole names; `ALL_LINEAR`: every
            linear layer.
        excluded: likewise, of modules that get none.
        layers: numbers of the layers that get any; None: all.
        lists: regular expressions of the lists that the layers are numbered in; empty: any.
        saved: endings of the names of modules that are trained whole.
    """

    modules: tuple[str, ...] | str
    excluded: tuple[str, ...] | str = ()
    layers: frozenset[int] | None = None
    lists: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()

    def adapts(self, module: str, linear: bool) -> bool:
        """Whether a module, of which peft can adapt the kind, gets factors.

        Args:
            linear: whether it is a linear layer, neither a convolution nor an embedding.
        """
        if _matches(self.excluded, module) or any(
            re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in self.saved
        ):
            return False
        if isinstance(self.modules, str):
            if self.modules.lower() == ALL_LINEAR:
                return linear
            return _matches(self.modules, module)
        if module in self.modules:  # a whole name is one, whatever its layer
            return True
        return _matches(self.modules, module) and self._in_layers(module)

    def saves(self, tensor: str) -> bool:
        """Whether a tensor is of a module that is trained whole."""
        parts = tensor.split(".")
        modules = (".".join(parts[:i]) for i in range(1, len(parts)))
        return any(module.endswith(self.saved) for module in modules)  # not only from a dot on

    def _in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\." for name in self.lists]
        found = (re.match(pattern, module) for pattern in patterns or [FIRST_LAYER])
        first = next((match for match in found if match), None)
        return first is not None and int(first["layer"]) in self.layers


@dataclass(frozen=True)
class LoraConfig:
    """What adapter_config.json states.

    Attributes:
        rank, alpha: of modules that no pattern names.
        ranks, alphas: of modules by regular expressions of the ends of their names.
        root: whether the product is divided by √rank instead of rank (rslora).
        bias: which biases were trained: none, all or lora_only.
        base: what it names as its base.
    """

    file: Path
    rank: float
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    root: bool
    bias: str
    targets: Targets
    base: Any

    def scale(self, module: str, rank: int) -> float:
        """The factor of a module, by the number of rows of its A.

        Raises:
            CheckpointError: another rank is stated.
        """
        stated = _by_pattern(self.ranks, module, self.rank)
        if rank != stated:
            raise CheckpointError(
                f"{self.file}: {module}: expected rank {stated:g}, as it states, found lora_A of "
                f"rank {rank}. Copy both files of the same adapter."
            )
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)


def read_lora_config(file: Path) -> LoraConfig:
    """Reads adapter_config.json.

    Raises:
        CheckpointError: it is damaged, or states what is not carried out here.
    """
    config = read_json(file)
    _refuse_variants(file, config)
    read = _Reader(file, config)
    return LoraConfig(
        file=file,
        rank=read.number("r", 8),
        alpha=read.number("lora_alpha", 8),
        ranks=read.patterns("rank_pattern"),
        alphas=read.patterns("alpha_pattern"),
        root=read.flag("use_rslora"),
        bias=read.bias(),
        targets=read.targets(),
        base=config.get("base_model_name_or_path"),
    )


def _refuse_variants(file: Path, config: Mapping[str, Any]) -> None:
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type: expected LORA, found {kind!r}. {MERGE}")
    # A list, since 1 == True: no other value of that kind is one of peft's.
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        raise CheckpointError(
            f"{file}: init_lora_weights: expected a start that leaves the base as it is, found "
            f"{start!r}. {MERGE}"
        )
    for name, value in config.items():
        if name not in KNOWN and value:
            raise CheckpointError(
                f"{file}: {name}: expected it unset, since plain LoRA is all that is read, found "
                f"{str(value)[:60]!r}. {MERGE}"
            )


class _Reader:
    """Fields of adapter_config.json, each checked."""

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        self.file = file
        self.config = config

    def targets(self) -> Targets:
        modules = self._names("target_modules")
        if not modules:
            raise self._error("target_modules", "names of modules or a regular expression")
        layers, lists = self._layers(), self._names("layers_pattern")
        for name, value in (("layers_to_transform", layers), ("layers_pattern", lists)):
            if value and isinstance(modules, str):
                raise self._error(name, "it unset, since target_modules is a regular expression")
        if lists and self.config.get("layers_to_transform") is None:
            raise self._error("layers_to_transform", "numbers beside layers_pattern")
        saved = self.config.get("modules_to_save") or []
        if not _is_list_of(str, saved):
            raise self._error("modules_to_save", "a list of names")
        for name in saved:
            self._compile("modules_to_save", name)
        lists = (lists,) if isinstance(lists, str) else lists
        for name in lists:
            self._compile("layers_pattern", name)
        return Targets(modules, self._names("exclude_modules"), layers, lists, tuple(saved))

    def bias(self) -> str:
        bias = self.config.get("bias") or "none"
        if bias not in BIASES:
            raise self._error("bias", f"one of {', '.join(BIASES)}")
        return str(bias)

    def flag(self, name: str) -> bool:
        value = self.config.get(name) or False
        if not isinstance(value, bool):
            raise self._error(name, "true or false")
        return value

    def number(self, name: str, default: float) -> float:
        return self._number(name, self.config.get(name, default))

    def patterns(self, name: str) -> dict[str, float]:
        value = self.config.get(name) or {}
        if not isinstance(value, Mapping):
            raise self._error(name, "an object")
        for key in value:
            self._compile(name, key)
        return {key: self._number(f"{name}.{key}", n) for key, n in value.items()}

    def _names(self, name: str) -> tuple[str, ...] | str:
        """Names, or a regular expression."""
        value = self.config.get(name) or []
        if isinstance(value, str):
            self._compile(name, value)
            return value
        if not _is_list_of(str, value):
            raise self._error(name, "names of modules or a regular expression")
        return tuple(value)

    def _layers(self) -> frozenset[int] | None:
        value = self.config.get("layers_to_transform")
        numbers = [value] if type(value) is int else [] if value is None else value
        if not _is_list_of(int, numbers):
            raise self._error("layers_to_transform", "a number or a list of numbers")
        return frozenset(numbers) if numbers else None

    def _number(self, name: str, value: Any) -> float:
        if not is_number(value) or not 0 < value <= LARGEST:
            raise CheckpointError(
                f"{self.file}: {name}: expected a number from 0 to {LARGEST:g}, found "
                f"{str(value)[:60]}."
            )
        return float(value)

    def _compile(self, name: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{self.file}: {name}: expected regular expressions, found {pattern!r} ({error})."
            ) from error

    def _error(self, name: str, expected: str) -> CheckpointError:
        found = repr(self.config.get(name))[:60]
        return CheckpointError(f"{self.file}: {name}: expected {expected}, found {found}.")


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _matches(names: tuple[str, ...] | str, module: str) -> bool:
    """A regular expression matches a whole name, a list of names the end of one, from a dot on."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None if names else False
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The number of the first pattern that the end of a module's name matches."""
    found = (n for key, n in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)
