"""The configuration from shapes and config.json, and their contradictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pi0.checkpoint.infer import infer_config, to_config_json
from pi0.checkpoint.load import empty_model
from pi0.config import PRESETS, GemmaConfig, Pi0Config
from pi0.errors import CheckpointError, ConfigError


def shapes(preset: str | Pi0Config) -> dict[str, tuple[int, ...]]:
    config = PRESETS[preset] if isinstance(preset, str) else preset
    state = empty_model(config, torch.float32).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


HEADS = {"vision": {"num_heads": 4}, "vlm": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 16}}
TRANSFORMERS = {
    "model_type": "pi0",
    "chunk_size": 50,
    "max_state_dim": 32,
    "vlm_config": {
        "vocab_size": 257152,
        "text_config": {
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 512,
        },
        "vision_config": {"num_attention_heads": 4, "image_size": 28},
    },
    "dit_config": {"hidden_size": 32, "num_hidden_layers": 2},
}
OPENPI = {
    "action_dim": 32,
    "action_horizon": 50,
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "precision": "bfloat16",
}
LEROBOT = {
    "type": "pi0",
    "chunk_size": 50,
    "max_state_dim": 32,
    "max_action_dim": 32,
    "tokenizer_max_length": 48,
    "paligemma_variant": "gemma_2b",
    "image_resolution": [224, 224],
}


@pytest.mark.parametrize("settings", [None, OPENPI, LEROBOT, to_config_json(PRESETS["pi0_base"])])
def test_published_model_needs_no_config(settings: dict[str, Any] | None) -> None:
    assert infer_config(shapes("pi0_base"), settings).config == PRESETS["pi0_base"]


@pytest.mark.parametrize("settings", [HEADS, TRANSFORMERS, to_config_json(PRESETS["tiny"])])
def test_small_model_with_heads_told(settings: dict[str, Any]) -> None:
    assert infer_config(shapes("tiny"), settings).config == PRESETS["tiny"]


def test_trunks_of_openpis_debug_configuration() -> None:
    dummy = GemmaConfig(64, 4, 128, 8, 1, 16)
    config = replace(PRESETS["tiny"], vlm=dummy, expert=dummy)
    variants = dict.fromkeys(("paligemma_variant", "action_expert_variant"), "dummy")
    settings = {"vision": {"num_heads": 4}, **variants}
    assert infer_config(shapes(config), settings).config == config


def test_what_is_assumed_is_said() -> None:
    assert infer_config(shapes("pi0_base"), None).assumed == ["horizon", "max_tokens"]
    assert infer_config(shapes("pi0_base"), LEROBOT).assumed == []


def test_small_model_without_heads() -> None:
    with pytest.raises(CheckpointError, match=r"expected vision\.num_heads, vlm\.num_heads"):
        infer_config(shapes("tiny"), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vlm": {"width": 2049}}, "vlm.width: the tensors say 2048, config.json says 2049"),
        ({"max_action_dim": 7}, "action_dim: the tensors say 32, config.json says 7"),
        ({"paligemma_variant": "gemma_300m"}, "vlm.width: the tensors say 2048"),
        ({"paligemma_variant": "gemma_7b"}, "expected one of gemma_2b"),
        ({"type": "pi05"}, "type: the tensors say pi0, config.json says pi05"),
        ({"type": "act"}, "expected one of pi0, pi05, found 'act'"),
        ({"chunk_size": 50, "action_horizon": 10}, "one value for horizon, found 10 and 50"),
        ({"chunk_size": "50"}, "chunk_size: expected a count, found '50'"),
        ({"type": ["pi0"]}, "expected one of pi0, pi05"),
        ({"paligemma_variant": [1]}, "expected one of gemma_2b"),
        ({"vlm": {"num_heads": 4}}, "2048 query and 256 key rows"),
        ({"expert": {"num_heads": 4}}, "expert num_heads: expected 8 as in the VLM"),
    ],
)
def test_contradictions(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        infer_config(shapes("pi0_base"), settings)


def test_pi05_is_recognised() -> None:
    names = shapes("pi0_base")
    for name in [n for n in names if n.startswith("expert.") and "norm" in n]:
        del names[name]
        names[name.replace(".weight", ".dense.weight")] = (3072, 1024)
    names = {n: s for n, s in names.items() if not n.startswith(("state_proj", "action_time"))}
    config = infer_config(names, None).config
    assert config.adaptive_norm
    assert (config.suffix_len, config.max_tokens, config.state_dim) == (50, 200, 32)


def test_state_of_pi05_is_in_no_tensor() -> None:
    """So that it may be wider than an action, or narrower."""
    for declared in ({"max_state_dim": 40}, {"state_dim": 40, "action_dim": 32}):
        config = infer_config(shapes("pi05_tiny"), HEADS | declared).config
        assert (config.state_dim, config.action_dim) == (40, 32)
        assert infer_config(shapes("pi05_tiny"), to_config_json(config)).config == config


@pytest.mark.parametrize("tower", ["vision_tower", "vlm"])
def test_lost_last_layer(tower: str) -> None:
    """Without config.json a file that lost its last layer must not pass as a shallower model."""
    lost = {"vision_tower": 26, "vlm": 17}[tower]
    names = {n: s for n, s in shapes("pi0_base").items() if f"{tower}.blocks.{lost}." not in n}
    with pytest.raises(CheckpointError, match=f"expected {lost + 1} layers, .* found {lost}"):
        infer_config(names, None)


def test_another_depth_if_told() -> None:
    names = {n: s for n, s in shapes("pi0_base").items() if "vision_tower.blocks.26." not in n}
    assert infer_config(names, {"vision": {"depth": 26}}).config.vision.depth == 26
