"""The model that training starts from: random weights of a preset or a file of sizes, or a
checkpoint's.

Random matrices are drawn from a normal distribution of variance 1/fan_in, cut at two deviations,
the last one of every residual branch divided by √(2·depth); biases are 0 and norms do nothing. A
token's embedding, which the model scales by √width, has unit variance. The velocity is 0 at first,
and branches behind an adaptive norm are closed, as in openpi (arXiv 2212.09748).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pi0.checkpoint.load import (
    Checkpoint,
    empty_model,
    load_model,
    open_checkpoint,
    require_flow,
)
from pi0.checkpoint.outputs import expand_user
from pi0.checkpoint.synth import RESIDUAL_ENDS
from pi0.config import PRESETS, SO400M, GemmaConfig, Pi0Config, SiglipConfig
from pi0.errors import CheckpointError, ConfigError, Pi0Error, kind_of
from pi0.model import Pi0
from pi0.number import is_count
from pi0.policy.robot import Robot
from pi0.policy.robots import find_robot, robot_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CUT_STD = 0.87962566  # the deviation of a unit normal distribution that is cut at ±2
SMALL = 20_000_000  # parameters
SIZES_SUFFIXES = (".json", ".toml")
PIECES, PIECE = 64, 1 << 16  # of a file that is hashed, and bytes of each
TOWERS = {"vision": SiglipConfig, "vlm": GemmaConfig, "expert": GemmaConfig}


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
        name: as the user wrote it.
        config: sizes of the model.
        checkpoint: None: random weights.
    """

    name: str
    config: Pi0Config
    checkpoint: Checkpoint | None = None

    def robot_name(self, named: str | Path | Robot | None) -> str | Path | Robot:
        """What is named, else what the checkpoint names, else generic."""
        return named or self.declared_robot or "generic"

    @property
    def declared_robot(self) -> str:
        """The robot that the checkpoint's config.json names, as `pi0 train` writes it; or ""."""
        declared = self.checkpoint.settings.get("robot") if self.checkpoint else None
        return declared if isinstance(declared, str) else ""

    def robot(self, named: str | Path | Robot | None) -> Robot:
        """The robot of `robot_name`.

        Raises:
            Pi0Error: there is none of that name, its file is damaged, or its own name means
                another robot, as which the trained checkpoint would be read.
        """
        pi05 = self.config.adaptive_norm
        try:
            robot = find_robot(self.robot_name(named), pi05)
        except Pi0Error as error:
            raise error if named else Pi0Error(f"{self.name}: config.json: {error}") from error
        if robot.name in robot_names() and find_robot(robot.name, pi05) != robot:
            raise ConfigError(
                f"robot {robot.name}: expected a name of its own, under which checkpoints find "
                "their robot, found that of another, which is built in or installed. Rename it."
            )
        return robot

    def model(self, seed: int, device: torch.device) -> Pi0:
        """The model in float32, ready for gradients.

        Raises:
            CheckpointError, ConfigError: see `load_model`.
        """
        if self.checkpoint is not None:
            size = self.config.vision.image_size
            model = load_model(self.checkpoint, torch.float32, device, image_size=size)
        else:
            model = empty_model(self.config, torch.float32).to_empty(device="cpu")
            initialise(model, seed)
            model = model.to(device)
        return model.requires_grad_(True).train()


def find_start(name: str, base: Path | None = None, **changes: int | None) -> Start:
    """What a checkpoint, a file of sizes (.json, .toml) or a preset's name means; a folder counts
    before a preset of its name.

    Args:
        base: the full model of a checkpoint that is an adapter.
        changes: image_size, horizon, max_tokens in place of the preset's or checkpoint's.

    Raises:
        ConfigError: a file of sizes that does not describe a model.
        CheckpointError: no preset and no checkpoint.
    """
    path = expand_user(name)
    size = changes.pop("image_size", None)
    checkpoint = None
    if _is_sizes(path) or (name in PRESETS and not path.exists()):
        if base is not None:
            raise ConfigError(
                f"--base: expected an adapter to start from, found {name}, which has random "
                "weights. Start from the adapter's folder, or leave out --base."
            )
        config = read_sizes(path) if path.exists() else PRESETS[name]
        for field, value in changes.items():
            if value is not None:
                config = replace(config, **{field: value})  # type: ignore[arg-type]
    else:
        try:
            declared = changes.get("horizon"), changes.get("max_tokens")
            checkpoint = open_checkpoint(path, *declared, base)
        except CheckpointError as error:
            if path.exists() or path.name != name:
                raise
            presets = ", ".join(PRESETS)
            raise CheckpointError(
                f"{error} Presets, with random weights, are {presets}."
            ) from error
        require_flow(checkpoint)
        config = checkpoint.config
    return Start(name, config if size is None else config.with_image_size(size), checkpoint)


def hash_files(paths: Iterable[Path]) -> str:
    """A short hash of files: of the whole content up to 4 MiB, of pieces all over larger ones."""
    out = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        out.update(str(size).encode())
        with path.open("rb") as file:
            for start in range(0, size, max(PIECE, size // PIECES)):
                file.seek(start)
                out.update(file.read(PIECE))
    return out.hexdigest()[:8]


def require_weights(start: Start) -> None:
    """Raises ConfigError for random weights in the published size: it is a checkpoint's name that
    was meant."""
    if start.checkpoint is None and start.name in PRESETS and start.config.vision == SO400M:
        raise ConfigError(
            f"{start.name}: expected the folder of a checkpoint, found none. The preset of that "
            "name has random weights, which need far more data than anybody records."
        )


def _is_sizes(path: Path) -> bool:
    index = path.name.endswith(".safetensors.index.json")
    return path.suffix in SIZES_SUFFIXES and path.is_file() and not index


def read_sizes(path: Path) -> Pi0Config:
    """Sizes of a model from a .json or .toml file; a config.json of `pi0 synth` is one.

    Raises:
        ConfigError: it cannot be read, or a size is missing, unknown or no count.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: expected a file of sizes, found: {reason}.") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: expected a table of sizes, found {kind_of(table)}.")
    kind = table.pop("type", None)
    if kind is not None and kind not in ("pi0", "pi05"):
        raise ConfigError(f"{path}: type: expected pi0 or pi05, found {kind!r}.")
    table.setdefault("adaptive_norm", kind == "pi05")
    table.pop("discrete_state_input", None)
    values = {name: _build(path, f"{name}.", cls, table.get(name)) for name, cls in TOWERS.items()}
    built: Pi0Config = _build(path, "", Pi0Config, table | values)
    return built


def _build(path: Path, prefix: str, cls: Any, table: object) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: expected a table {prefix.rstrip('.')}, found {table!r}.")
    names = {field.name for field in fields(cls)}
    for found, what in ((sorted(names - set(table)), "missing"), (sorted(set(table) - names), "")):
        if found:
            expected = f"{', '.join(f'{prefix}{name}' for name in sorted(names))}"
            raise ConfigError(
                f"{path}: expected {expected}, found {prefix}{found[0]} {what or 'as well'}."
            )
    for name, value in table.items():
        other = name in TOWERS or (name == "adaptive_norm" and isinstance(value, bool))
        if not (other or is_count(value)):
            raise ConfigError(f"{path}: {prefix}{name}: expected a count, found {value!r}.")
    return cls(**table)


def is_small(config: Pi0Config) -> bool:
    """Whether a step takes milliseconds."""
    return sum(p.numel() for p in empty_model(config, torch.float32).parameters()) < SMALL


def set_threads(threads: int | None, config: Pi0Config) -> None:
    """One thread for small models, for which more only wait for each other."""
    if threads is not None or is_small(config):
        torch.set_num_threads(threads or 1)


@torch.no_grad()
def initialise(model: Pi0, seed: int) -> None:
    """Fills every parameter in place; the same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(_initial(name, parameter.shape, model.config, generator))


def _initial(name: str, shape: torch.Size, config: Pi0Config, generator: torch.Generator) -> Tensor:
    module, _, kind = name.rpartition(".")
    if "norm" in module.rpartition(".")[2] and name.startswith("vision_tower") and kind == "weight":
        return torch.ones(shape)  # of a LayerNorm; an RMSNorm multiplies by 1 + weight
    if kind == "bias" or "norm" in module or module == "action_out_proj":
        return torch.zeros(shape)
    fan_in = shape[-1] if kind == "position" else math.prod(shape[1:])
    std = fan_in**-0.5
    if module.endswith(RESIDUAL_ENDS):
        depth = config.vision.depth if name.startswith("vision_tower") else config.vlm.depth
        std *= (2 * depth) ** -0.5
    values = torch.empty(shape)
    nn.init.trunc_normal_(values, std=std / CUT_STD, a=-2 * std / CUT_STD, b=2 * std / CUT_STD,
                          generator=generator)  # fmt: skip
    return values
