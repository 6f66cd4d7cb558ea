"""The files that LeRobot keeps beside a model: config.json, two processors, their statistics.

`make_processors` is what LeRobot 0.6.1 builds for a config.json (`policies/pi0/processor_pi0.py`,
`policies/pi05/processor_pi05.py`);
`pi0 synth` writes it, and a folder without processor files is read as if it held it. Step names and
fields are those of LeRobot's `processor/` modules.

Knows nothing of what a step computes (`pi0.policy.lerobot`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pi0.config import GEMMA_2B, GEMMA_300M, SO400M, Pi0Config

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ACTION = "observation.state", "action"
IMAGES, EMPTY_CAMERA = "observation.images.", "observation.images.empty_camera_"
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # as in lerobot/pi0_base
NORM_MAP = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
NORM_MAPS = {"pi0": NORM_MAP, "pi05": NORM_MAP | {"STATE": "QUANTILES", "ACTION": "QUANTILES"}}
MAX_DIM = 32  # LeRobot's default of max_state_dim and max_action_dim
MAX_LENGTHS = {"pi0": 48, "pi05": 200}  # and of tokenizer_max_length
EPS = 1e-8
# Fields of config.json before LeRobot 0.4, with which 0.6.1 refuses to load it.
OLD_FIELDS = {"adapt_to_pi_aloha", "use_delta_joint_actions_aloha", "resize_imgs_with_padding",
              "num_steps", "proj_width", "use_cache", "attention_implementation",
              "train_state_proj"}  # fmt: skip
TOKENIZER_NAME = "google/paligemma-3b-pt-224"
# Statistics under which every mode of normalisation leaves values as they are.
UNIT_STATISTICS = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0,
                   "q01": -1.0, "q10": -1.0, "q50": 0.0, "q90": 1.0, "q99": 1.0}  # fmt: skip

Features = dict[str, dict[str, Any]]
Steps = dict[str, dict[str, Any]]  # config by registered name, in order


def make_config_json(config: Pi0Config) -> dict[str, Any]:
    """The config.json that LeRobot writes for a model with three cameras.

    Towers of the published sizes are named by their variants. Others have no name in LeRobot: their
    sizes are added in our own words, without which nobody knows their heads.
    """
    size = config.vision.image_size
    kind = "pi05" if config.adaptive_norm else "pi0"
    published = (config.vision, config.vlm, config.expert) == (SO400M, GEMMA_2B, GEMMA_300M)
    return {
        "type": kind,
        "n_obs_steps": 1,
        "input_features": {
            **{IMAGES + name: _feature("VISUAL", 3, size, size) for name in CAMERAS},
            STATE: _feature("STATE", config.state_dim),
        },
        "output_features": {ACTION: _feature("ACTION", config.action_dim)},
        "device": "cpu",
        "dtype": "float32",
        "chunk_size": config.horizon,
        "n_action_steps": config.horizon,
        "max_state_dim": config.state_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": 10,
        "use_relative_actions": False,
        "relative_exclude_joints": ["gripper"],
        "action_feature_names": None,
        "image_resolution": [size, size],
        "empty_cameras": 0,
        "normalization_mapping": dict(NORM_MAPS[kind]),
        "tokenizer_max_length": config.max_tokens,
        **(
            {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
            if published
            else {name: asdict(getattr(config, name)) for name in ("vision", "vlm", "expert")}
        ),
    }


def complete_features(settings: Mapping[str, Any]) -> tuple[Features, Features]:
    """The input and output features of a config.json, with those that LeRobot adds.

    A state or action that is not declared is as wide as the model's padding.
    """
    inputs, outputs = (
        dict(features) if isinstance(features := settings.get(name), Mapping) else {}
        for name in ("input_features", "output_features")
    )
    inputs.setdefault(STATE, _feature("STATE", settings.get("max_state_dim", MAX_DIM)))
    outputs.setdefault(ACTION, _feature("ACTION", settings.get("max_action_dim", MAX_DIM)))
    return inputs, outputs


def make_processors(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The preprocessor and postprocessor that LeRobot builds for a config.json, without statistics.

    Args:
        settings: the content of config.json; nothing in it is checked here.
    """
    inputs, outputs = complete_features(settings)
    kind = "pi05" if settings.get("type") == "pi05" else "pi0"
    relative = settings.get("use_relative_actions", False)
    norm_map = settings.get("normalization_mapping", NORM_MAPS[kind])
    tokenizer = {
        "max_length": settings.get("tokenizer_max_length", MAX_LENGTHS[kind]),
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": TOKENIZER_NAME,
    }
    relative_actions = {
        "enabled": relative,
        "exclude_joints": settings.get("relative_exclude_joints", ["gripper"]),
        "action_names": settings.get("action_feature_names"),
    }
    device = {"device": "cpu", "float_dtype": None}
    normalize = {"eps": EPS, "features": inputs | outputs, "norm_map": norm_map}
    unnormalize = {"eps": EPS, "features": outputs, "norm_map": norm_map}
    first: Steps = {"rename_observations_processor": {"rename_map": {}}, "to_batch_processor": {}}
    of_values = {
        "relative_actions_processor": relative_actions,
        "normalizer_processor": normalize,
    }
    if kind == "pi05":  # normalised first: the prompt holds the state
        of_prompt: Steps = {"pi05_prepare_state_tokenizer_processor_step": {}}
        last = {"tokenizer_processor": tokenizer, "device_processor": device}
        preprocessor = first | of_values | of_prompt | last
    else:
        of_prompt = {"pi0_new_line_processor": {}, "tokenizer_processor": tokenizer}
        preprocessor = first | of_prompt | {"device_processor": device} | of_values
    postprocessor = {
        "unnormalizer_processor": unnormalize,
        "absolute_actions_processor": {"enabled": relative},
        "device_processor": device,
    }
    return (
        _processor("policy_preprocessor", preprocessor),
        _processor("policy_postprocessor", postprocessor),
    )


def processor_files(
    settings: Mapping[str, Any], statistics: Mapping[str, Tensor]
) -> dict[str, bytes]:
    """Both processors and their statistics, as the contents of files by name.

    Args:
        statistics: by names such as "observation.state.mean"; empty: there are none.
    """
    files = {}
    for content in make_processors(settings):
        for index, step in enumerate(content["steps"]):
            if "norm_map" in step["config"] and statistics:
                step["state_file"] = (
                    f"{content['name']}_step_{index}_{step['registry_name']}.safetensors"
                )
                files[step["state_file"]] = save(dict(statistics))
        files[f"{content['name']}.json"] = (json.dumps(content, indent=2) + "\n").encode()
    return files


def unit_statistics(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Statistics of all features of a config.json that leave values as they are."""
    inputs, outputs = complete_features(settings)
    statistics: dict[str, Tensor] = {}
    for key, feature in (inputs | outputs).items():
        shape = (3, 1, 1) if feature["type"] == "VISUAL" else tuple(feature["shape"])
        statistics[f"{key}.count"] = torch.ones(1)
        for name, value in UNIT_STATISTICS.items():
            statistics[f"{key}.{name}"] = torch.full(shape, value)
    return statistics


def _feature(kind: str, *shape: int) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}


def _processor(name: str, steps: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    entries = [{"registry_name": step, "config": config} for step, config in steps.items()]
    return {"name": name, "steps": entries}
