"""What a run writes: checkpoints that every engine reads, and the state from which it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi0.checkpoint.files import DTYPE_NAMES, TensorInfo, write
from pi0.checkpoint.infer import DEFAULT_STEPS, STEPS_KEYS, to_config_json
from pi0.checkpoint.layouts import Layout
from pi0.checkpoint.lerobot import (
    ACTION,
    IMAGES,
    STATE,
    make_config_json,
    processor_files,
)
from pi0.checkpoint.locate import ADAPTER_WEIGHTS, WEIGHTS
from pi0.checkpoint.outputs import new_folder, replacing
from pi0.checkpoint.synth import UNREAD, tensor_list
from pi0.data.statistics import norm_stats_json
from pi0.errors import Pi0Error
from pi0.policy.export import tokenizer_name
from pi0.policy.normalize import Statistics
from pi0.policy.pipeline import Pipeline
from pi0.policy.statistics import FILE_NAME
from pi0.train.lora import LoraOptions, adapter_tensors, write_adapter_config

CONFIG = "config.json"
ACTION_STEPS = "n_action_steps"
STATE_FILE = "training_state.pt"
STATE_KEYS = ("done", "parameters", "average", "optimizer", "settings")


@dataclass(frozen=True)
class Export:
    """What is written beside weights.

    Attributes:
        layout: OPENPI or LEROBOT.
        dtype: of the weights in the file.
        cameras: names of the dataset's cameras, in the order of the model's slots; LeRobot
            declares them.
        statistics: of "state" and "actions".
        execute: actions of a chunk that a policy carries out by default; None: all.
        steps: of denoising, by default.
        lora, base: the adapter that is trained, and the checkpoint that it changes; None: whole
            models are written.
    """

    layout: Layout
    dtype: torch.dtype
    pipeline: Pipeline
    cameras: tuple[str, ...]
    statistics: Mapping[str, Statistics]
    execute: int | None = None
    steps: int = DEFAULT_STEPS
    lora: LoraOptions | None = None
    base: Path | None = None

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes a checkpoint; nothing remains if it fails.

        Raises:
            Pi0Error: the folder is there already, or cannot be written.
        """
        file, tensors = self._tensors(weights)
        headers = {
            name: TensorInfo(Path(file), tuple(value.shape), DTYPE_NAMES[self.dtype])
            for name, value in tensors.items()
        }
        values = ((name, value.to("cpu", self.dtype)) for name, value in tensors.items())
        with new_folder(folder, sum(info.bytes for info in headers.values())) as temporary:
            write(temporary / file, values, headers)
            if self.lora and self.base:
                write_adapter_config(temporary, self.lora, list(tensors), self.base)
            for name, content in self._files().items():
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            tokenizer = self.pipeline.tokenizer.source
            shutil.copyfile(tokenizer, temporary / tokenizer_name(tokenizer))

    def _tensors(self, weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
        """The name of the file, and its tensors by their names."""
        if self.lora:
            return ADAPTER_WEIGHTS, adapter_tensors(weights)
        # A head that is never read is there all the same: openpi and LeRobot load strictly.
        return WEIGHTS, {
            theirs: torch.zeros(()).expand(shape) if ours == UNREAD else weights[ours]
            for theirs, (ours, shape) in tensor_list(self.pipeline.config, self.layout).items()
        }

    def _files(self) -> dict[str, bytes]:
        config, robot = self.pipeline.config, self.pipeline.robot
        if self.layout.name == "lerobot":
            return self._lerobot_files()
        settings = {**to_config_json(config), "robot": robot.name}
        if self.execute:
            settings[ACTION_STEPS] = self.execute
        if self.steps != DEFAULT_STEPS:
            settings[STEPS_KEYS[0]] = self.steps
        if config.adaptive_norm:
            settings["discrete_state_input"] = self.pipeline.prompt.state
        return {
            CONFIG: _json(settings),
            f"assets/{robot.name}/{FILE_NAME}": norm_stats_json(self.statistics),
        }

    def _lerobot_files(self) -> dict[str, bytes]:
        settings = make_config_json(self.pipeline.config) | {STEPS_KEYS[0]: self.steps}
        if self.execute:
            settings[ACTION_STEPS] = self.execute
        size = self.pipeline.config.vision.image_size
        settings["input_features"] = {
            **{IMAGES + n: {"type": "VISUAL", "shape": [3, size, size]} for n in self.cameras},
            STATE: {"type": "STATE", "shape": [len(self.statistics["state"]["mean"])]},
        }
        settings["output_features"] = {
            ACTION: {"type": "ACTION", "shape": [len(self.statistics["actions"]["mean"])]}
        }
        statistics = {
            f"{key}.{name}": torch.tensor(values, dtype=torch.float32)
            for key, what in ((STATE, "state"), (ACTION, "actions"))
            for name, values in self.statistics[what].items()
        }
        return {CONFIG: _json(settings), **processor_files(settings, statistics)}


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a training state, over the one before.

    Raises:
        Pi0Error: it cannot be written.
    """
    with replacing(path) as temporary:
        try:
            torch.save(dict(state), temporary)
        except RuntimeError as error:  # of torch's own writer, which does not say why
            raise Pi0Error(
                f"{path}: expected room for the state of a run, found: "
                f"{str(error).splitlines()[0]}. Make room, and go on with --resume."
            ) from error


def load_state(path: Path) -> dict[str, Any]:
    """A training state.

    Raises:
        Pi0Error: it is damaged, or none.
    """
    found, state = "another file", None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's and torch's own classes
        found = "a file that is damaged or no such state"
        if isinstance(error, OSError) and error.strerror:
            found = error.strerror
    if not (isinstance(state, dict) and {*STATE_KEYS} <= {*state}):
        raise Pi0Error(
            f"{path}: expected the state of a run, found {found}. Copy it again, or begin another "
            "run, which may start from a checkpoint of this one."
        )
    return state


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
