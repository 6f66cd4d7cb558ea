"""A robot for LeRobot's own command, which writes down the actions that it is sent.

LeRobot finds the class of a configuration `NAMEConfig` under `NAME` beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dots_env import CAMERA, WIDTH, observe
from lerobot.robots import Robot, RobotConfig

JOINTS = tuple(f"joint_{i:02}.pos" for i in range(WIDTH))


@RobotConfig.register_subclass("dots")
@dataclass(kw_only=True)
class DotsRobotConfig(RobotConfig):
    """Where actions are written, one line of JSON for each."""

    log: Path


class DotsRobot(Robot):
    """Sees what the environment of `dots_env` shows, and stays where it is."""

    config_class, name = DotsRobotConfig, "dots"
    is_calibrated = is_connected = True

    def __init__(self, config: DotsRobotConfig) -> None:
        super().__init__(config)
        self._log = config.log

    @property
    def observation_features(self) -> dict[str, Any]:
        return {**self.action_features, CAMERA: (48, 64, 3)}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(JOINTS, float)

    def connect(self, calibrate: bool = True) -> None: ...
    def calibrate(self) -> None: ...
    def configure(self) -> None: ...
    def disconnect(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        seen = observe()
        return {**dict(zip(JOINTS, seen["agent_pos"], strict=True)), **seen["pixels"]}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        with self._log.open("a") as file:
            file.write(json.dumps([float(action[joint]) for joint in JOINTS]) + "\n")
        return action
