"""Gymnasium environments of a few lines, and a policy that solves them.

A white dot is to be moved onto the spot whose colour the sentence names. Everything is NumPy.
Importing this registers them, so that worker processes find them as "dots:test/Dots-v0".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from torch import Tensor

from pi0.config import PRESETS
from pi0.engines.base import Capabilities, Engine, EngineOptions
from pi0.inputs import ModelInputs
from pi0.policy import Camera, Policy, Robot

SIZE = 28  # pixels, those of the tiny preset
COLORS = {"red": 0, "blue": 2}  # channel
OTHER = {"red": "blue", "blue": "red"}
REACHED = 0.1
MOVE = 0.05  # of the picture, for an action of 1
ROBOT = Robot(
    name="dots",
    cameras=(Camera("image"),),
    state=(("position", 2),),
    action_dim=2,
    action_names=("x", "y"),
)
ROBOT_FILE = """
name = "dots"
cameras = [{ key = "image" }]
state = [{ key = "position", length = 2 }]
actions = [{ name = "x" }, { name = "y" }]
"""


class DotsEnv(gymnasium.Env[dict[str, Any], np.ndarray]):
    """Has everything that the tabletop has, too."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 5}
    tasks: ClassVar[tuple[str, ...]] = ("red", "blue")
    fails_at = -1  # the step that raises

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        image = Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        position = Box(0, 1, (2,), np.float32)
        self.observation_space = Dict({"image": image, "position": position, "clock": Box(0, 99)})
        self.action_space = Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        names = list(COLORS)
        self.named = options.get("task") or names[self.np_random.integers(2)]
        self.task = self.named
        if options.get("instruction") == "swapped":
            self.named = OTHER[self.named]
        places = self.np_random.permutation([[0.2, 0.2], [0.8, 0.2], [0.5, 0.85]])
        jitter = self.np_random.uniform(-0.1, 0.1, (3, 2))
        self.dot, *spots = places + jitter
        self.spots = dict(zip(COLORS, spots, strict=True))
        self.clock = 0
        return self._observe(), self._info()

    def step(self, action):
        assert self.action_space.contains(action), action
        self.clock += 1
        if self.clock == self.fails_at:
            raise RuntimeError("the motor is on fire")
        self.dot = np.clip(self.dot + MOVE * action, 0, 1)
        success = bool(np.linalg.norm(self.dot - self.spots[self.named]) < REACHED)
        return self._observe(), 0.0, success, False, self._info()

    def render(self):
        return np.kron(self._picture(), np.ones((3, 3, 1), np.uint8))

    def _picture(self):
        picture = np.zeros((SIZE, SIZE, 3), np.uint8)
        for name, channel in COLORS.items():
            draw(picture, self.spots[name], channel)
        draw(picture, self.dot, slice(None))
        return picture

    def _observe(self):
        return {
            "image": self._picture(),
            "position": self.dot.astype(np.float32),
            "clock": np.array([self.clock], np.float32),
        }

    def _info(self):
        distance = {name: np.linalg.norm(self.dot - spot) for name, spot in self.spots.items()}
        return {
            "prompt": f"move the dot to the {self.named} spot",
            "task": self.task,
            "success": bool(distance[self.named] < REACHED),
            "wrong": bool(distance[OTHER[self.named]] < REACHED),
        }


class PlainEnv(DotsEnv):
    """As LeRobot's environments are: nested keys, is_success, no tasks, no sentence."""

    tasks = ()

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        image, position = (self.observation_space[key] for key in ("image", "position"))
        self.observation_space = Dict({"pixels": Dict({"top": image}), "agent_pos": position})

    def _observe(self):
        seen = super()._observe()
        return {"pixels": {"top": seen["image"]}, "agent_pos": seen["position"]}

    def _info(self):
        return {"is_success": np.array([super()._info()["success"]])}


class BrokenEnv(DotsEnv):
    fails_at = 3


class SilentEnv(DotsEnv):
    def _info(self):
        return {"prompt": "move the dot", "distance": 0.5}


class OldEnv(DotsEnv):
    """As before Gymnasium: reset gives the observation alone."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options=options)[0]


class NanEnv(DotsEnv):
    """Says NaN where it does not know."""

    tasks = None

    def _info(self):
        return super()._info() | {"success": np.nan, "wrong": None}


class BlindEnv(DotsEnv):
    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.observation_space = Box(0, 1, (2,), np.float32)


class WideEnv(DotsEnv):
    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.action_space = Box(-1, 1, (3,), np.float32)


class OneTaskEnv(DotsEnv):
    tasks = "red"  # type: ignore[assignment]


class WordEnv(DotsEnv):
    def _info(self):
        return super()._info() | {"success": "yes"}


class ListEnv(DotsEnv):
    def _info(self):
        return super()._info() | {"prompt": ["move", "the dot"]}


KINDS = (DotsEnv, PlainEnv, BrokenEnv, SilentEnv, OldEnv, NanEnv, BlindEnv, WideEnv)
for kind in (*KINDS, OneTaskEnv, WordEnv, ListEnv):
    name = f"test/{kind.__name__.removesuffix('Env')}-v0"
    if name not in gymnasium.registry:
        gymnasium.register(name, entry_point=kind, max_episode_steps=40)


def draw(picture: np.ndarray, place: np.ndarray, channels: Any) -> None:
    """A square of 3 × 3 pixels; (0, 0) is the upper left corner."""
    column, row = np.rint(place * (SIZE - 3)).astype(int) + 1
    picture[row - 1 : row + 2, column - 1 : column + 2, channels] = 255


class DotEngine(Engine):
    """Sees the dot and the named spot in the picture, and moves the one to the other.

    A little of the noise stays in the actions, so that they depend on it.
    """

    name = "dots"
    capabilities = Capabilities(precisions=("float32",))

    def __init__(self, gain: float = 4.0, fails_at: int = -1) -> None:
        super().__init__(SimpleNamespace(config=PRESETS["tiny"]), EngineOptions("float32"))
        self.words: dict[tuple[int, ...], str] = {}
        self.gain, self.calls, self.fails_at = gain, 0, fails_at

    def prefill(self, inputs: ModelInputs, tap: Any = None) -> Any:
        raise NotImplementedError

    def velocity(self, x_t: Tensor, t: Tensor, cache: Any, tap: Any = None) -> Tensor:
        raise NotImplementedError

    def _sample(
        self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: Callable[[], None]
    ) -> Tensor:
        self.calls += 1
        actions = 0.05 * noise
        if self.calls == self.fails_at:
            return actions * torch.nan
        named = self.words.get(tuple(inputs.tokens[0].tolist()), "red")
        image = (inputs.images[0, 0].numpy() + 1) / 2
        white = image.min(axis=0) > 0.5
        spot = (image[COLORS[named]] > 0.5) & ~white
        if white.any() and spot.any():
            way = centre(spot) - centre(white)
            # A chunk that goes there straight, as fast as it may, and then stays.
            for tick in range(noise.shape[1]):
                move = np.clip(way / (MOVE * SIZE), -0.8, 0.8)
                way = way - move * MOVE * SIZE
                actions[0, tick, :2] += torch.from_numpy(move).float()
        return actions.clamp(-1, 1) if self.gain <= 4 else actions * self.gain


def centre(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


@dataclass(frozen=True)
class DotPolicy:
    """Makes the policy for a tiny checkpoint; picklable."""

    path: Path
    robot: Robot = ROBOT
    gain: float = 4.0
    fails_at: int = -1
    on_limit: str = "error"
    n_action_steps: int | None = 8

    def __call__(self) -> Policy:
        engine = DotEngine(self.gain, self.fails_at)
        policy = Policy.from_checkpoint(
            self.path,
            robot=self.robot,
            engine=engine,
            norm_stats="none",
            preprocessing="openpi",
            on_limit=self.on_limit,
            n_action_steps=self.n_action_steps,
        )
        for name in COLORS:
            empty = {"image": np.zeros((SIZE, SIZE, 3), np.uint8), "position": np.zeros(2)}
            renamed = {camera.key: empty["image"] for camera in self.robot.cameras}
            renamed |= {key: empty["position"] for key, _ in self.robot.state}
            inputs, _ = policy.pipeline.encode(
                {**renamed, "prompt": f"move the dot to the {name} spot"}
            )
            engine.words[tuple(inputs.tokens[0].tolist())] = name
        return policy
