"""LeRobot's PEFT case as a folder to be edited: `base/` and `adapter/` side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ORACLE = Path(__file__).parent / "oracles" / "lerobot_peft_pi0"
PREFIX = "base_model.model.model."
EXPERT = PREFIX + "paligemma_with_expert.gemma_expert.model.layers."


def copy_case(folder: Path) -> Path:
    """Copies both folders, and says in them what shapes cannot tell; returns the adapter's.

    Their config.json name variants of the published size, which this model does not have.
    """
    heads = json.loads((ORACLE / "config_heads.json").read_text())
    for name in ("base", "adapter"):
        shutil.copytree(ORACLE / name, folder / name)
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        del config["paligemma_variant"], config["action_expert_variant"]
        path.write_text(json.dumps(config | heads))
    return folder / "adapter"


def configure(adapter: Path, **fields: Any) -> None:
    """Changes fields of adapter_config.json; None removes one."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: v for name, v in config.items() if v is not None}))


def rewrite(adapter: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the adapter's tensors."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def write_adapter(adapter: Path, base: str) -> None:
    """A small adapter of the tiny preset, rank 2, that names its base."""
    adapter.mkdir()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": base,
    }
    config["target_modules"] = ["state_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"A": (2, 32), "B": (32, 2)}
    factors = {
        f"{PREFIX}state_proj.lora_{name}.weight": torch.ones(s) for name, s in shapes.items()
    }
    save_file(factors, adapter / "adapter_model.safetensors")
