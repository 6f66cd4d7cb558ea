"""Low-rank adapters (LoRA, arXiv 2106.09685) in training, by PEFT, and their folder.

PEFT wraps linear layers of the model in place. What is written is what LeRobot writes for such a
run: adapter_config.json and adapter_model.safetensors with LeRobot's names of modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pi0.checkpoint.layouts import LEROBOT, their_names
from pi0.checkpoint.lora import PREFIX
from pi0.errors import ConfigError, Pi0Error, install_hint
from pi0.model import Pi0

# Attention and MLP of both trunks, and the small projections, by our names of modules.
TARGETS = (
    r"(vlm|expert)\.blocks\.\d+\.(q|k|v|o|gate|up|down)_proj"
    r"|(state|action_in|action_out)_proj|(action_)?time_mlp_(in|out)"
)
NAME = "default"  # PEFT's name of an adapter that is the only one
FACTOR = re.compile(rf"(.+)\.lora_(A|B)\.{NAME}\.weight")


@dataclass(frozen=True)
class LoraOptions:
    """A LoRA adapter.

    Attributes:
        rank: of the factors.
        alpha: their product counts alpha / rank; None: the rank.
        targets: regular expression of whole names of linear layers.

    Raises:
        ConfigError: an alpha that has no meaning.
    """

    rank: int
    alpha: float | None = None
    targets: str = TARGETS

    def __post_init__(self) -> None:
        if not 0 < self.scale_alpha < float("inf"):
            raise ConfigError(f"--lora-alpha: expected more than 0, found {self.alpha:g}.")

    @property
    def scale_alpha(self) -> float:
        """alpha, stated or not."""
        return float(self.rank if self.alpha is None else self.alpha)


def add_lora(model: Pi0, options: LoraOptions, seed: int) -> None:
    """Wraps the layers; only the factors are trained from now on.

    Raises:
        ConfigError: no layer is meant, or none has a rank as large.
        Pi0Error: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Pi0Error(
            "--lora: expected the package peft, which the extra pi0[train] brings, found none. "
            f"{install_hint('train')}"
        ) from error
    modules = {
        name: min(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    try:
        chosen = [name for name in modules if re.fullmatch(options.targets, name)]
    except re.error as error:
        raise ConfigError(
            f"--lora-targets: expected a regular expression, found {options.targets!r} ({error})."
        ) from error
    if not chosen:
        raise ConfigError(
            f"--lora-targets: expected names of linear layers such as {next(iter(modules))}, "
            f"found {options.targets!r}, which fits none."
        )
    if options.rank > (most := max(modules[name] for name in chosen)):
        raise ConfigError(
            f"--lora: expected a rank of at most {most}, the greatest that a layer to adapt can "
            f"have, found {options.rank}."
        )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=cast(int, options.scale_alpha),
        target_modules=chosen,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def adapter_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors among a model's weights, by the names of an adapter's file."""
    found = {}
    for name, value in weights.items():
        factor = FACTOR.fullmatch(name)
        if factor:
            found[f"{PREFIX}{_their_module(factor[1])}.lora_{factor[2]}.weight"] = value
    return found


def write_adapter_config(folder: Path, options: LoraOptions, names: list[str], base: Path) -> None:
    """Writes adapter_config.json.

    Args:
        names: of the adapter's tensors.
        base: the checkpoint that the adapter changes.
    """
    from peft import LoraConfig

    modules = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in names}
    settings: dict[str, Any] = {
        "r": options.rank,
        "lora_alpha": options.scale_alpha,
        "target_modules": sorted(modules),
        # Not the link that another checkpoint may be under tomorrow.
        "base_model_name_or_path": str(base.resolve() if base.is_dir() else base.absolute()),
        "inference_mode": True,
    }
    LoraConfig(**settings).save_pretrained(str(folder))


def _their_module(ours: str) -> str:
    (name,) = their_names(LEROBOT, f"{ours}.weight")
    return name.removesuffix(".weight")
