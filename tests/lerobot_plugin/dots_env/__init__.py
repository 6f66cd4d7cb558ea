"""An environment for LeRobot's own command: its reward tells which actions it got.

Its observation never changes, so that a test can compute the same actions itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig

WIDTH, STEPS, TASK = 32, 3, "pick up the cube"
CAMERA = "base_0_rgb"


def observe() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (48, 64, 3), np.uint8)
    return {"pixels": {CAMERA: image}, "agent_pos": rng.uniform(-0.9, 0.9, WIDTH)}


def reward(actions: np.ndarray) -> float:
    """Of actions [n, WIDTH]: no other actions have the same."""
    return float((actions * np.linspace(1, 2, WIDTH)).sum())


class Dots(gym.Env):
    """Ends after `STEPS` actions."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - Gymnasium's

    def __init__(self, render_mode: str = "rgb_array") -> None:
        self.render_mode = render_mode
        self._max_episode_steps = STEPS
        self.task = self.task_description = TASK
        self.action_space = gym.spaces.Box(-1e3, 1e3, (WIDTH,), np.float32)
        pixels = gym.spaces.Dict({CAMERA: gym.spaces.Box(0, 255, (48, 64, 3), np.uint8)})
        positions = gym.spaces.Box(-np.inf, np.inf, (WIDTH,), np.float64)
        self.observation_space = gym.spaces.Dict({"pixels": pixels, "agent_pos": positions})

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self._left = STEPS
        return observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        done = self._left == 0
        return observe(), reward(action[None]), done, False, {"is_success": done}

    def render(self) -> np.ndarray:
        image: np.ndarray = observe()["pixels"][CAMERA]
        return image


gym.register("dots_env/Dots-v0", Dots)


@EnvConfig.register_subclass("dots")
@dataclass
class DotsConfig(EnvConfig):
    task: str = "Dots-v0"
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (WIDTH,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (WIDTH,)),
            f"pixels/{CAMERA}": PolicyFeature(FeatureType.VISUAL, (48, 64, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            f"pixels/{CAMERA}": f"observation.images.{CAMERA}",
        }
    )

    @property
    def package_name(self) -> str:
        return "dots_env"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}
