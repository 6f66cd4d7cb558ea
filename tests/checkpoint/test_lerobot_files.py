"""LeRobot's own files, as `pi0 synth` writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from pi0.checkpoint.infer import infer_config
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.lerobot import make_config_json, make_processors
from pi0.checkpoint.load import empty_model
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS


def test_configurations_are_read_back() -> None:
    """Published towers by LeRobot's names for them alone, others by sizes that we add."""
    for preset, config in PRESETS.items():
        settings = make_config_json(config)
        assert ("paligemma_variant" in settings, "vlm" in settings) == (
            (True, False) if preset.endswith("_base") else (False, True)
        )
        state = empty_model(config, torch.float32).state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        inferred = infer_config(shapes, settings)
        assert (inferred.config, inferred.assumed) == (config, [])


def test_processors_follow_the_configuration() -> None:
    settings = {"use_relative_actions": True, "tokenizer_max_length": 72, "max_action_dim": 9}
    before, after = make_processors(settings)
    configs = {step["registry_name"]: step["config"] for step in before["steps"]}
    assert configs["tokenizer_processor"]["max_length"] == 72
    assert configs["relative_actions_processor"]["enabled"]
    assert after["steps"][1]["config"] == {"enabled": True}
    assert configs["normalizer_processor"]["features"]["action"]["shape"] == [9]


def test_statistics_lie_where_the_steps_say(tmp_path: Path) -> None:
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    for name, index in (("policy_preprocessor", 6), ("policy_postprocessor", 0)):
        step = json.loads((tmp_path / f"{name}.json").read_text())["steps"][index]
        assert step["state_file"] == f"{name}_step_{index}_{step['registry_name']}.safetensors"
        statistics = load_file(tmp_path / step["state_file"])
        assert statistics["observation.state.std"].tolist() == [1.0] * 32
        assert statistics["observation.images.base_0_rgb.mean"].shape == (3, 1, 1)


def test_other_layouts_have_no_processors(tmp_path: Path) -> None:
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.float32)
    assert not list(tmp_path.glob("policy_*"))
