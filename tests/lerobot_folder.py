"""LeRobot folders without weights, as LeRobot 0.6.1 writes them, to be edited by tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pi0.checkpoint.lerobot import POSTPROCESSOR, PREPROCESSOR, make_processors

STATE_DIM, ACTION_DIM = 6, 5
CAMERAS = ("observation.images.top", "observation.images.wrist")


def random_statistics(seed: int = 0) -> dict[str, torch.Tensor]:
    """State of 6, actions of 5, two cameras; ordered quantiles and positive deviations."""
    rng = np.random.default_rng(seed)
    shapes = {"observation.state": (STATE_DIM,), "action": (ACTION_DIM,)}
    shapes |= {camera: (3, 1, 1) for camera in CAMERAS}
    statistics = {}
    for key, shape in shapes.items():
        ordered = np.sort(rng.normal(0, 2, (6, *shape)), axis=0)
        names = ("min", "q01", "q10", "q90", "q99", "max")
        values = dict(zip(names, ordered, strict=True))
        values |= {"mean": rng.normal(0, 1, shape), "std": rng.uniform(0.2, 3, shape)}
        statistics |= {f"{key}.{name}": v.astype(np.float32) for name, v in values.items()}
    return {name: torch.from_numpy(value) for name, value in statistics.items()}


class LerobotFolder:
    """A folder whose three JSON files are edited in memory and written by `write`.

    Attributes:
        config: config.json.
        before, after: the steps of both processors, by name.
        statistics: of both processors; None: the files are not written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        visual = {"type": "VISUAL", "shape": [3, 48, 64]}
        self.config: dict[str, Any] = {
            "type": "pi0",
            "input_features": {
                CAMERAS[0]: visual,
                CAMERAS[1]: visual,
                "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 224, 224]},
                "observation.state": {"type": "STATE", "shape": [STATE_DIM]},
            },
            "output_features": {"action": {"type": "ACTION", "shape": [ACTION_DIM]}},
            "chunk_size": 50,
            "n_action_steps": 50,
            "max_state_dim": 32,
            "max_action_dim": 32,
            "tokenizer_max_length": 48,
        }
        self.before, self.after = (content["steps"] for content in make_processors(self.config))
        self.step("normalizer_processor")["state_file"] = "pre.safetensors"
        self.step("unnormalizer_processor")["state_file"] = "post.safetensors"
        self.statistics: dict[str, torch.Tensor] | None = random_statistics()

    def step(self, name: str) -> dict[str, Any]:
        """The entry of a step in either file."""
        return next(s for s in (*self.before, *self.after) if s.get("registry_name") == name)

    def set(self, name: str, fields: Mapping[str, Any]) -> None:
        """Changes fields of a step's config."""
        self.step(name)["config"] |= fields

    def set_modes(self, modes: Mapping[str, str], **fields: Any) -> None:
        """Changes norm_map and other fields of both normalisers."""
        for name in ("normalizer_processor", "unnormalizer_processor"):
            self.set(name, {"norm_map": dict(modes), **fields})

    def set_relative(self, enabled: bool = True, **fields: Any) -> None:
        """Enables relative actions, or disables them, in all files."""
        self.set("relative_actions_processor", {"enabled": enabled, **fields})
        self.set("absolute_actions_processor", {"enabled": enabled})
        self.config["use_relative_actions"] = enabled

    def write(self) -> Path:
        """Writes all files."""
        (self.path / "config.json").write_text(json.dumps(self.config))
        for name, steps in ((PREPROCESSOR, self.before), (POSTPROCESSOR, self.after)):
            content = {"name": name.removesuffix(".json"), "steps": steps}
            (self.path / name).write_text(json.dumps(content))
        if self.statistics is not None:
            for name in ("pre.safetensors", "post.safetensors"):
                save_file(self.statistics, self.path / name)
        return self.path
